"""The road that data takes: open the source, plan, calibrate, walk the blocks, and write formats from the codes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import auto_round
from auto_round.calibrate.dataset import CalibrationSet, Dataset, build_calibration
from auto_round.calibrate.selftext import sample_tokens
from auto_round.calibrate.walker import LoadedBlock, Walk, head_inputs, walk
from auto_round.errors import AutoRoundError, FormatError, SourceError, SpecError
from auto_round.formats.base import Export, Format
from auto_round.qtensor import QTensor
from auto_round.runtime.device import peak_device_bytes, peak_resident_bytes, release_cached
from auto_round.runtime.events import BlockStats, Listener
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.source.blocks import block_names, find_block_lists, linears_in
from auto_round.source.opening import Source, open_source
from auto_round.source.skeleton import Skeleton
from auto_round.spec.plan import LinearShape, Plan, Rule, make_plan
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.block import Activations, BlockTask, tune_block
from auto_round.tune.moments import Moments


@dataclass(frozen=True)
class Job:
    """Everything that decides the result of one run."""

    model: str | Path | PreTrainedModel
    tokenizer: Any | None
    scheme: Scheme
    layer_config: Mapping[str, Rule]
    recipe: Recipe
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype
    quant_lm_head: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Quantised:
    """A finished run: where the model came from, its plan, its codes on disk, and what happened on the way."""

    job: Job
    source: Source
    plan: Plan
    stored_names: Mapping[str, str]
    journal: Journal
    calibration: CalibrationSet | None
    blocks: tuple[BlockStats, ...]
    seconds: float

    def tensor(self, name: str) -> QTensor:
        """The codes of the layer `name`."""
        return self.journal.get(name)


def quantise(job: Job, formats: Sequence[Format], scratch: Path, listener: Listener) -> Quantised:
    """Run the whole tuning; codes end in a journal below `scratch`.

    formats: those the result is meant for; a layer that one of them cannot hold is kept. Raises AutoRoundError of the
    right kind, before any tuning wherever the fault can be seen by then.
    """
    begin = time.perf_counter()
    torch.manual_seed(job.recipe.seed)  # some models draw in their forward; nothing of ours reads the global generator
    source = open_source(job.model, job.tokenizer, scratch, trust_remote_code=job.trust_remote_code)
    skeleton = Skeleton(source.config, source.checkpoint, trust_remote_code=job.trust_remote_code)
    _check_complete(skeleton)
    block_lists = find_block_lists(skeleton.model)
    names = block_names(skeleton.model, block_lists)
    plan = _plan(job, skeleton, block_lists, names, formats)
    _tell_plan(plan, listener)
    stored = {name: skeleton.stored_name(name + ".weight") or name + ".weight" for name in plan.quantised}
    journal = Journal(scratch / "blocks")
    calibration, blocks = None, _round_alone(job, skeleton, plan, names, journal, listener)
    if blocks is None:
        calibration = _calibration(job, source, skeleton, listener)
        blocks = _tune(job, skeleton, plan, names, calibration, journal, listener)
    return Quantised(job, source, plan, stored, journal, calibration, tuple(blocks), time.perf_counter() - begin)


def save(result: Quantised, output: Format, folder: Path, largest_shard: int) -> None:
    """Write one format into the empty folder `folder` and prove that every layer reads back as it was tuned.

    Raises FormatError naming the layer that does not.
    """
    recipe, data = result.job.recipe, result.calibration
    provenance = {
        "autoround_version": auto_round.__version__,
        "iters": recipe.iters,
        "seed": recipe.seed,
        "dataset": data.source if data else None,
        "dataset_sha256": data.digest if data else None,
    }
    export = Export(
        checkpoint=result.source.checkpoint,
        config=result.source.raw_config,
        plan=result.plan,
        stored_names=result.stored_names,
        tensor=result.tensor,
        extra=result.source.extra_files,
        provenance={key: value for key, value in provenance.items() if value is not None},
    )
    output.write(export, folder, largest_shard)
    prove(output, folder, {result.stored_names[n].removesuffix(".weight"): n for n in result.plan.quantised}, result)


def prove(output: Format, folder: Path, names: Mapping[str, str], result: Quantised) -> None:
    """Read the folder back; every layer must be there and bit-identical to its codes in the journal."""
    missing = dict(names)
    for stored, tensor in output.read(folder):
        name = missing.pop(stored, None)
        if name is None:
            raise FormatError(f"{folder}: read back a layer {stored!r} that was not to be written")
        if not tensor.same(result.tensor(name)):
            raise FormatError(f"{folder}: layer {stored!r} does not read back as it was tuned; please report this")
    if missing:
        raise FormatError(f"{folder}: {len(missing)} layers are missing, {next(iter(missing))!r} among them")


def _check_complete(skeleton: Skeleton) -> None:
    missing = skeleton.missing()
    if missing:
        raise SourceError(
            f"{skeleton.checkpoint.folder}: {len(missing)} parameters of {type(skeleton.model).__name__} are not in "
            f"the checkpoint, such as {missing[0]!r}; it is incomplete or its config.json is of another model"
        )


def _plan(job: Job, skeleton: Skeleton, block_lists: list[str], names: list[str], formats: Sequence[Format]) -> Plan:
    inside = [
        LinearShape(name, *linear.weight.shape)
        for block in names
        for name, linear in linears_in(skeleton.model.get_submodule(block), block + ".").items()
    ]
    head = _head_name(skeleton)
    outside = [LinearShape(head, *skeleton.model.get_submodule(head).weight.shape)] if head else []
    rules = dict(job.layer_config)
    if job.quant_lm_head:
        if head is None:
            raise SpecError(
                "quant_lm_head: this model's head shares its weight with the embedding and is kept; leave it out"
            )
        rules = {head: job.scheme, **rules}

    def refuse(shape: LinearShape, scheme: Scheme) -> str | None:
        return next((reason for f in formats if (reason := f.refuse(shape, scheme))), None)

    return make_plan(inside, outside, block_lists, job.scheme, rules, refuse)


def _head_name(skeleton: Skeleton) -> str | None:
    """Name of the output head when it is a Linear with a weight of its own."""
    head = skeleton.model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    name = next(n for n, m in skeleton.model.named_modules() if m is head)
    return None if skeleton.is_tied(name + ".weight") else name


def _tell_plan(plan: Plan, listener: Listener) -> None:
    widths = sorted({layer.scheme.name for layer in plan.quantised.values() if layer.scheme})
    listener.note(
        f"{len(plan.quantised)} layers to {', '.join(widths)} ({plan.bits_per_weight():.2f} bits per weight stored)"
    )
    for reason in sorted({layer.reason for layer in plan.kept.values()} - {"outside the blocks"}):
        kept = [layer.name for layer in plan.kept.values() if layer.reason == reason]
        listener.warn(f"{len(kept)} layers are kept as they are, {kept[0]} among them: {reason}")


def _round_alone(
    job: Job, skeleton: Skeleton, plan: Plan, names: list[str], journal: Journal, listener: Listener
) -> list[BlockStats] | None:
    """Plain round-to-nearest needs no activations at all. Returns None when the recipe asks for more."""
    if job.recipe.iters or job.recipe.start != "plain":
        return None
    blocks = []
    listener.begin(len(names), 0)
    try:
        for index, block in enumerate(names):
            begin = time.perf_counter()
            listener.block_started(index, block)
            mine = [name for name in plan.quantised if name.startswith(block + ".")]
            journal.put(f"block-{index:05d}", {name: _alone(job, skeleton, plan, name, None) for name in mine})
            blocks.append(_stats(job, index, block, len(mine), begin))
            listener.block_finished(blocks[-1])
        others = [name for name in plan.quantised if not name.startswith(tuple(f"{b}." for b in names))]
        if others:
            journal.put("outside", {name: _alone(job, skeleton, plan, name, None) for name in others})
    finally:
        listener.end()
    return blocks


def _alone(job: Job, skeleton: Skeleton, plan: Plan, name: str, moment: Tensor | None) -> QTensor:
    scheme = plan.quantised[name].scheme
    assert scheme is not None
    try:
        return quantise_alone(skeleton.weight(name + ".weight"), scheme, job.recipe.start, moment, job.device)
    except AutoRoundError as error:
        raise type(error)(f"layer {name!r}: {error}") from None


def _stats(job: Job, index: int, name: str, layers: int, begin: float) -> BlockStats:
    peak = peak_device_bytes(job.device) or peak_resident_bytes()
    return BlockStats(index, name, layers, None, None, None, 0, time.perf_counter() - begin, peak)


def _calibration(job: Job, source: Source, skeleton: Skeleton, listener: Listener) -> CalibrationSet:
    recipe = job.recipe
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has one
    seqlen = recipe.seqlen
    if isinstance(limit, int) and 0 < limit < seqlen:
        listener.warn(f"samples are cut to {limit} tokens, the longest this model takes (seqlen was {seqlen})")
        seqlen = limit

    def sampler(count: int, length: int, seed: int) -> Tensor:
        listener.note(f"the model samples {count} texts of {length} tokens itself; it is in memory whole for this")
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=job.dtype, trust_remote_code=job.trust_remote_code
        ).to(job.device)
        return sample_tokens(model, source.tokenizer, count, length, seed, job.recipe.batch_size)

    calibration = build_calibration(
        job.dataset,
        source.tokenizer,
        nsamples=recipe.nsamples,
        seqlen=seqlen,
        seed=recipe.seed,
        listener=listener,
        sampler=sampler,
    )
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    largest = int(calibration.tokens.max())
    if largest >= vocabulary:
        raise SpecError(f"calibration holds token id {largest}, but the model's vocabulary ends at {vocabulary - 1}")
    samples, length = calibration.tokens.shape
    listener.note(f"calibration: {samples} samples of {length} tokens from {calibration.source}")
    return calibration


def _tune(
    job: Job,
    skeleton: Skeleton,
    plan: Plan,
    names: list[str],
    calibration: CalibrationSet,
    journal: Journal,
    listener: Listener,
) -> list[BlockStats]:
    recipe = job.recipe
    settings = Walk(
        batch_size=recipe.batch_size,
        quantised_inputs=recipe.enable_quanted_input,
        device=job.device,
        dtype=job.dtype,
        store=torch.device("cpu") if recipe.low_gpu_mem_usage else job.device,
        compile=recipe.enable_torch_compile,
    )
    mask = None if bool(calibration.mask.all()) else calibration.mask
    blocks: list[BlockStats] = []
    listener.begin(len(names), recipe.iters)
    try:
        final = None
        for loaded in walk(skeleton, names, calibration.tokens, settings):
            blocks.append(_tune_one(job, skeleton, plan, loaded, mask, journal, listener))
            final = loaded.inputs if settings.quantised_inputs else loaded.targets
            release_cached(job.device)
        outside = [name for name in plan.quantised if not name.startswith(tuple(f"{b}." for b in names))]
        if outside and final is not None:
            _heads(job, skeleton, plan, names, outside, calibration, final, settings, journal)
    finally:
        listener.end()
    return blocks


def _tune_one(
    job: Job,
    skeleton: Skeleton,
    plan: Plan,
    loaded: LoadedBlock,
    mask: Tensor | None,
    journal: Journal,
    listener: Listener,
) -> BlockStats:
    begin = time.perf_counter()
    listener.block_started(loaded.index, loaded.name)
    planned = {name: linear for name, linear in loaded.linears.items() if name in plan.quantised}
    if not planned:
        return _stats(job, loaded.index, loaded.name, 0, begin)
    task = BlockTask(
        run=loaded.run,
        linears=planned,
        weights={name: skeleton.weight(name + ".weight") for name in planned},
        schemes={name: scheme for name in planned if (scheme := plan.quantised[name].scheme) is not None},
    )
    try:
        tuned = tune_block(
            task,
            Activations(loaded.inputs, loaded.targets, mask),
            job.recipe,
            generator_for(job.recipe.seed, "block", loaded.index),
            job.device,
            lambda iteration, loss: listener.step(loaded.index, iteration, loss),
        )
    except AutoRoundError as error:
        raise AutoRoundError(f"{loaded.name}: {error}") from None
    journal.put(f"block-{loaded.index:05d}", tuned.tensors)
    stats = BlockStats(
        index=loaded.index,
        name=loaded.name,
        layers=len(planned),
        loss_plain=tuned.loss_plain,
        loss_start=tuned.loss_start,
        loss_end=tuned.loss_end,
        kept_iteration=tuned.kept_iteration,
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_device_bytes(job.device) or peak_resident_bytes(),
    )
    listener.block_finished(stats)
    return stats


def _heads(
    job: Job,
    skeleton: Skeleton,
    plan: Plan,
    names: list[str],
    outside: list[str],
    calibration: CalibrationSet,
    final: Tensor,
    settings: Walk,
    journal: Journal,
) -> None:
    """Layers behind the blocks: range search and compensated rounding on their real inputs, no steps."""
    for name in outside:
        head = skeleton.model.get_submodule(name)
        assert isinstance(head, nn.Linear)
        moments = Moments({name: head})
        for rows, inputs in head_inputs(skeleton, names, calibration.tokens, final, head, settings):
            moments.next_batch(calibration.mask[rows].to(inputs.device))
            moments.observe(name, inputs)
        journal.put("outside", {name: _alone(job, skeleton, plan, name, moments.of(name))})
