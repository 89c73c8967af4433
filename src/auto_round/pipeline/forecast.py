"""The forecast of a run: from the headers of the checkpoint, the plan, and a moment's trial of the machine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from auto_round.formats.base import Format
from auto_round.pipeline.gate import gate_bytes
from auto_round.pipeline.job import Prepared, Saving
from auto_round.pipeline.needs import Needs, budget_bytes, needs, too_much
from auto_round.pipeline.runtimes import readers
from auto_round.pipeline.saving import blank_export
from auto_round.pipeline.timing import Rates, measure
from auto_round.report.forecast import Forecast, ForecastFormat, ForecastLayer
from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LayerPlan

ATTENTION_SHARE = 0.75  # of all pairs of tokens: causal attention needs half, kernels do more
LOSSES = 5  # passes over the held-out samples in one block: plain, start, and the candidates
HELD_LEAST = 1


def forecast(prepared: Prepared, saving: Saving, target: Path, seqlen: int) -> Forecast:
    """Foresee a run into `target`. seqlen: tokens of a sample as the model takes them. Nothing is written but a trial
    of the disk, and no weight is read."""
    job, plan = prepared.job, prepared.plan
    calibrated = bool(job.recipe.iters) or job.recipe.start != "plain"
    samples = job.recipe.nsamples if calibrated else 0
    wanted = needs(prepared, samples, seqlen)
    problems = [sentence] if (sentence := too_much(wanted, job)) else []
    checking = gate_bytes(prepared, samples, seqlen) if saving.max_kl is not None else None
    formats = tuple(_format(prepared, saving, output) for output in saving.formats)
    journal = plan.codes_bytes()
    disk = journal + sum(entry.bytes for entry in formats) + (wanted.activation_bytes if wanted.on_disk else 0)
    place = next(parent for parent in (target, *target.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if disk > free:
        problems.append(f"{disk / 1e9:.2f} GB of disk are needed and {free / 1e9:.2f} GB are free")
    rates = measure(job, plan.scheme, place)
    return Forecast(
        model=prepared.source.title,
        model_bytes=sum(entry.nbytes for entry in prepared.source.checkpoint.entries.values()),
        parameters=sum(p.numel() for p in prepared.skeleton.model.parameters()),
        recipe=asdict(job.recipe),
        layers=tuple(_layer(prepared, layer) for layer in plan.layers),
        bits_per_weight=plan.bits_per_weight(),
        formats=formats,
        journal_bytes=journal,
        disk_bytes=disk,
        disk_free_bytes=free,
        memory={**wanted.memory, **({"checking": checking} if checking else {})},
        device_memory=wanted.device_bytes,
        memory_free_bytes=budget_bytes(job),
        activations="on disk" if wanted.on_disk else "in memory",
        samples_per_forward=wanted.samples_per_forward,
        seconds=_seconds(prepared, wanted, rates, samples, seqlen, disk),
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
        readers={reader.runtime: reader.obstacle for reader in readers(prepared.plan, output.name)},
    )


def _seconds(
    prepared: Prepared, wanted: Needs, rates: Rates, samples: int, seqlen: int, written: int
) -> Mapping[str, float]:
    weights = sum(layer.out_features * layer.in_features for layer in prepared.plan.quantised.values())
    source = sum(entry.nbytes for entry in prepared.source.checkpoint.entries.values())
    saving = weights * rates.packed + written * (rates.written + rates.read)
    if not samples:
        return {"rounding": weights * rates.rounded + source * rates.read, "saving": saving}
    recipe = prepared.job.recipe
    per_step = min(recipe.batch_size * recipe.gradient_accumulate_steps, samples)
    held = max(HELD_LEAST, round(recipe.heldout * samples)) if recipe.heldout else samples
    starts = passes = steps = 0.0
    searching = recipe.start != "plain"
    for block in prepared.blocks:
        module = prepared.skeleton.model.get_submodule(block)
        planned = [m for n, m in module.named_modules() if f"{block}.{n}" in prepared.plan.quantised]
        shapes = [tuple(m.weight.shape) for m in planned if isinstance(m, nn.Linear)]
        mine = sum(out * inputs for out, inputs in shapes)
        every = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        width = max((inputs for _, inputs in shapes), default=0)
        attention = ATTENTION_SHARE * 2 * seqlen * min(width, min((inputs for _, inputs in shapes), default=0))
        passes += rates.forward * seqlen * (every + attention) * (2 * samples + samples * searching + LOSSES * held)
        steps += recipe.iters * (per_step * seqlen * (every + attention) * rates.step + mine * rates.sweep)
        starts += mine * rates.searched
        if recipe.start == "compensated":
            starts += rates.compensated * sum(out * inputs**2 + inputs**3 for out, inputs in shapes)
            starts += rates.forward * seqlen * samples * sum(i * i for i in {inputs for _, inputs in shapes})
    return {"passes": passes + source * rates.read, "starts": starts, "steps": steps, "saving": saving}


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
