"""Before any work: open the model, see that it is whole, and decide what happens to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from auto_round.errors import SourceError, SpecError
from auto_round.formats.base import Format
from auto_round.pipeline.job import Job, Prepared
from auto_round.runtime.events import Listener
from auto_round.source.blocks import block_names, find_block_lists, linears_in
from auto_round.source.opening import open_source
from auto_round.source.skeleton import Skeleton
from auto_round.spec.plan import LinearShape, Plan, make_plan
from auto_round.spec.scheme import Scheme


def prepare(job: Job, formats: Sequence[Format], scratch: Path) -> Prepared:
    """Open the model from its headers and plan every layer; no weight is read.

    formats: those the result is meant for; a layer that one of them cannot hold is kept. scratch: where a loaded model
    or a GGUF file is unpacked. Raises SourceError or SpecError.
    """
    source = open_source(job.model, job.tokenizer, scratch, trust_remote_code=job.trust_remote_code)
    skeleton = Skeleton(source.config, source.checkpoint, trust_remote_code=job.trust_remote_code)
    _check_complete(skeleton)
    block_lists = find_block_lists(skeleton.model)
    blocks = block_names(skeleton.model, block_lists)
    plan = _plan(job, skeleton, block_lists, blocks, formats)
    stored = {name: skeleton.stored_name(name + ".weight") or name + ".weight" for name in plan.quantised}
    return Prepared(job, source, skeleton, plan, tuple(blocks), stored)


def tell_plan(plan: Plan, listener: Listener) -> None:
    """Say what will be quantised, and warn of layers that are kept without having been asked for."""
    widths = sorted({layer.scheme.name for layer in plan.quantised.values() if layer.scheme})
    listener.note(
        f"{len(plan.quantised)} layers to {', '.join(widths)} ({plan.bits_per_weight():.2f} bits per weight stored)"
    )
    for reason in sorted({layer.reason for layer in plan.kept.values()} - {"outside the blocks"}):
        kept = [layer.name for layer in plan.kept.values() if layer.reason == reason]
        listener.warn(f"{len(kept)} layers are kept as they are, {kept[0]} among them: {reason}")


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

    plan = make_plan(inside, outside, block_lists, job.scheme, rules, refuse)
    for output in formats:
        output.check(plan)
    return plan


def _head_name(skeleton: Skeleton) -> str | None:
    """Name of the output head when it is a Linear with a weight of its own."""
    head = skeleton.model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    name = next(n for n, m in skeleton.model.named_modules() if m is head)
    return None if skeleton.is_tied(name + ".weight") else name
