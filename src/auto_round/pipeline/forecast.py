"""The forecast of a run: from the headers of the checkpoint, the plan, and a moment's trial of the machine."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from auto_round.formats.base import Format
from auto_round.formats.clients import Held, clients
from auto_round.pipeline.duration import seconds
from auto_round.pipeline.gate import foreseen
from auto_round.pipeline.job import Job, Prepared, Saving
from auto_round.pipeline.needs import (
    IN_PLACE,
    budget_bytes,
    device_shortage,
    needs,
    own_texts,
    shortage,
    too_much,
    writing_bytes,
)
from auto_round.pipeline.publishing import SPARE, journal_bytes
from auto_round.pipeline.saving import blank_export
from auto_round.pipeline.timing import Rates, measure
from auto_round.pipeline.writing import check
from auto_round.report.forecast import Forecast, ForecastFormat, ForecastLayer
from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LayerPlan
from auto_round.spec.scheme import Scheme


def forecast(prepared: Prepared, saving: Saving, target: Path, seqlen: int, opening: float) -> Forecast:
    """Foresee a run into `target`. seqlen: tokens of a sample as the model takes them. opening: seconds it took to open
    and plan the model. Nothing is written but a trial of the disk, and few weights are read."""
    job, plan = prepared.job, prepared.plan
    calibrated = job.recipe.calibrated
    if calibrated:
        check(prepared)
    samples = job.recipe.block_samples if calibrated else 0
    wanted = needs(prepared, samples, seqlen)
    own = own_texts(job, seqlen) if calibrated else []
    wants = [(0, 0), *(writing_bytes(prepared, texts, length) for texts, _, length in own)]
    writing, on_device = max(host for host, _ in wants), max(device for _, device in wants)
    short = (too_much(wanted, job), device_shortage(wanted, job), shortage("writing", writing, job, IN_PLACE))
    problems = [sentence for sentence in short if sentence]
    checked = foreseen(prepared, samples, seqlen) if saving.max_kl is not None else None
    formats = tuple(_format(prepared, saving, output) for output in saving.formats)
    journal, outputs = journal_bytes(prepared), sum(entry.bytes for entry in formats)
    disk = journal + max(outputs, wanted.activation_bytes if wanted.on_disk else 0)
    place = next(parent for parent in (target, *target.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if disk + SPARE > free:
        problems.append(f"{disk / 1e9:.2f} GB of disk are needed and {free / 1e9:.2f} GB are free")
    schemes = Counter(layer.scheme for layer in plan.quantised.values() if layer.scheme is not None)
    usual = max(schemes, key=lambda scheme: schemes[scheme], default=plan.scheme)
    rates, unwritable = _rates(job, usual, place, prepared)
    problems += [unwritable] if unwritable else []
    return Forecast(
        model=prepared.source.title,
        model_bytes=prepared.skeleton.checkpoint.nbytes,
        parameters=sum(p.numel() for p in prepared.skeleton.model.parameters()),
        recipe=asdict(job.recipe),
        layers=tuple(_layer(prepared, layer) for layer in plan.layers),
        bits_per_weight=plan.bits_per_weight(),
        formats=formats,
        journal_bytes=journal,
        disk_bytes=disk,
        disk_free_bytes=free,
        memory={
            **({"writing": writing} if writing else {}),
            **wanted.memory,
            **({"checking": checked.peak_bytes} if checked else {}),
        },
        device_memory=None if wanted.device_bytes is None else max(wanted.device_bytes, on_device),
        memory_free_bytes=budget_bytes(job),
        activations="on disk" if wanted.on_disk else "in memory",
        samples_per_forward=wanted.samples_per_forward,
        seconds={
            # The end gate has transformers open a model once more.
            "opening": opening * (2 if checked and checked.opened else 1),
            **seconds(prepared, rates, samples, seqlen, outputs, checked),
        },
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        problems=(*problems, *_problems(prepared, seqlen, calibrated)),
    )


def _layer(prepared: Prepared, layer: LayerPlan) -> ForecastLayer:
    bits = layer.scheme.bits_per_weight(layer.in_features) if layer.scheme else 0.0
    if layer.scheme is None:
        stored = prepared.skeleton.stored_name(layer.name + ".weight")
        entry = prepared.source.checkpoint.entries.get(stored or "")
        bits = 8 * entry.nbytes / (layer.out_features * layer.in_features) if entry else 0.0
    name = layer.scheme.name if layer.scheme else "kept"
    return ForecastLayer(layer.name, (layer.out_features, layer.in_features), name, layer.reason, bits)


def _format(prepared: Prepared, saving: Saving, output: Format) -> ForecastFormat:
    export = blank_export(prepared)
    return ForecastFormat(
        format=output.name,
        files=dict(output.sizes(export, saving.largest_shard)),
        other_bytes=sum(file.stat().st_size for file in export.extra),
        clients=clients(Held(prepared.plan, output.name, output.settings(prepared.plan))),
    )


def _rates(job: Job, scheme: Scheme, place: Path, prepared: Prepared) -> tuple[Rates, str | None]:
    """What this machine does in a second, and what is wrong with `place`, where the run will write.

    Should it not be writable, another disk stands for it.
    """
    entries = prepared.skeleton.checkpoint.entries.values()
    try:
        return measure(job, scheme, place, entries), None
    except OSError as error:
        sentence = f"{place}: cannot be written: {error.strerror}; times are those of another disk"
        return measure(job, scheme, Path(tempfile.gettempdir()), entries), sentence


def _problems(prepared: Prepared, seqlen: int, calibrated: bool) -> list[str]:
    job, plan = prepared.job, prepared.plan
    found = [f"vLLM and SGLang will refuse the result: {conflict}" for conflict in broken_fusions(plan)[:3]]
    reasons = {layer.reason for layer in plan.kept.values()} - {"outside the blocks"}
    for reason in sorted(reasons):
        names = [layer.name for layer in plan.kept.values() if layer.reason == reason]
        found.append(f"{len(names)} layers are kept as they are, {names[0]} among them: {reason}")
    ragged = [
        layer
        for layer in plan.quantised.values()
        if layer.scheme is not None and layer.in_features % layer.scheme.group_width(layer.in_features)
    ]
    if ragged:
        found.append(
            f"{len(ragged)} layers have a short last group, {ragged[0].name} with {ragged[0].in_features} inputs among "
            "them: exact here, but many other readers want groups that divide the inputs; a smaller --group_size may"
        )
    if calibrated and seqlen < job.recipe.seqlen:
        found.append(f"samples are cut to {seqlen} tokens, the longest this model takes")
    if calibrated and prepared.source.tokenizer is None:
        found.append("the model has no tokenizer: calibration needs token ids")
    return found
