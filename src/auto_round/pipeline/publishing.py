"""From codes to the output folder: written beside it, proved, recorded, and put in its place whole."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import auto_round
from auto_round.errors import FormatError, OutputError
from auto_round.formats.base import Format
from auto_round.pipeline.finishing import FINISHED
from auto_round.pipeline.gate import Verdict, check, judge
from auto_round.pipeline.job import Prepared, Quantised, Ready, Saving
from auto_round.pipeline.saving import blank_export, save
from auto_round.report.record import KeptLayer, RunReport, SavedFolder
from auto_round.runtime.device import peak_device_bytes, peak_resident_bytes
from auto_round.runtime.events import Listener
from auto_round.runtime.workspace import Workspace

RECORD = "auto_round.json"
SPARE = 64_000_000  # bytes beside weights and journal: tokenizer files, configs, a file system's own needs


def publish(result: Quantised, saving: Saving, work: Workspace, listener: Listener) -> RunReport:
    """Write all formats, compare them with the original, and put them in the target's place.

    Raises FormatError naming a layer that does not read back as it was tuned, before anything is put in place, and
    CheckError, after that, when the result is too far from the original.
    """
    shutil.rmtree(work.staging, ignore_errors=True)
    places = _places(work.staging, saving.formats)
    folders = []
    for output, folder in places:
        folder.mkdir(parents=True)
        save(result, output, folder, saving.largest_shard)
        listener.note(f"{output.name}: every layer read back from the folder as it was tuned")
        final = work.target / folder.relative_to(work.staging)
        folders.append(SavedFolder(output.name, str(final), _bytes_in(folder)))
    written = [(output.name, folder) for output, folder in places]
    verdict = None if saving.max_kl is None else check(result, written, listener)
    report = _report(result, tuple(folders), verdict)
    for _, folder in places:
        (folder / RECORD).write_text(report.to_json(measured=False), encoding="utf-8")
    work.publish()
    if verdict is not None and saving.max_kl is not None:
        judge(verdict, saving.max_kl, result.prepared.blocks, work.target)
    return report


def _places(root: Path, formats: Sequence[Format]) -> list[tuple[Format, Path]]:
    """Each format and its folder: `root` itself for a single one."""
    return [(f, root if len(formats) == 1 else root / f.name.replace(":", "-")) for f in formats]


def was_published(target: Path) -> bool:
    """True when `target` may be what an earlier run of the same job made; `published` knows for sure."""
    return any(True for _ in _records(target))


def published(target: Path, ready: Ready, formats: Sequence[Format]) -> RunReport | None:
    """The record of `target` when this very job has made all of it already, else None."""
    for report in _reports(target):
        places = _places(target, formats)
        wanted = [(output.name, _bytes_in(folder) - _bytes_of(folder / RECORD)) for output, folder in places]
        if report.signature != ready.signature or [(f.format, f.bytes) for f in report.folders] != wanted:
            return None
        pairs = zip(report.folders, places, strict=True)
        return replace(report, folders=tuple(replace(saved, path=str(folder)) for saved, (_, folder) in pairs))
    return None


def journal_bytes(prepared: Prepared) -> int:
    """Bytes of the finished blocks: once, or once more with the scales that are learned after all of them."""
    return (2 if prepared.job.recipe.finish_iters else 1) * prepared.plan.codes_bytes()


def made_with(target: Path) -> dict[str, Any] | None:
    """Of the run that made the output `target`: "device", "compute_dtype", and "calibration", the title of its text."""
    for report in _reports(target):
        return {
            "device": torch.device(report.device).type,
            "compute_dtype": report.compute_dtype,
            "calibration": report.calibration and report.calibration["source"],
        }
    return None


def kept_all(prepared: Prepared, work: Workspace) -> bool:
    """True when every block, what lies outside and the last stage have their files in the workspace."""
    titles = len(prepared.blocks) + bool(prepared.outside) + bool(prepared.job.recipe.finish_iters)
    return len(list(work.blocks.glob("*.safetensors"))) >= titles


def check_space(prepared: Prepared, saving: Saving, work: Workspace, activations: int) -> None:
    """Raise OutputError when journal and outputs will not fit the disk; what an earlier start wrote counts as there.

    activations: bytes of those that lie on the disk while blocks are tuned, and are gone when outputs are written.
    """
    needed = SPARE + journal_bytes(prepared) - _bytes_in(work.blocks)
    export = blank_export(prepared)
    outputs = sum(sum(output.sizes(export, saving.largest_shard).values()) for output in saving.formats)
    needed += max(outputs, activations)
    free = shutil.disk_usage(work.folder).free + _bytes_in(work.staging)
    if needed > free:
        raise OutputError(
            f"{work.target}: {needed / 1e9:.2f} GB are needed on this disk for the finished blocks and the output, "
            f"{free / 1e9:.2f} GB are free. Free some, write fewer formats at once, or choose another output_dir."
        )


def _reports(target: Path) -> Iterator[RunReport]:
    """The records of all formats in `target`, up to the first that is none of this release's."""
    for file in _records(target):
        try:
            yield RunReport.from_json(file.read_text(encoding="utf-8"))
        except (FormatError, ValueError):
            return


def _records(target: Path) -> list[Path]:
    return sorted([*target.glob(RECORD), *target.glob(f"*/{RECORD}")])


def _bytes_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _bytes_in(folder: Path) -> int:
    return sum(_bytes_of(file) for file in folder.rglob("*")) if folder.is_dir() else 0


def _report(result: Quantised, folders: tuple[SavedFolder, ...], verdict: Verdict | None) -> RunReport:
    job, data = result.job, result.calibration
    return RunReport(
        model=result.source.title,
        folders=folders,
        scheme=result.plan.scheme.name,
        bits_per_weight=result.plan.bits_per_weight(),
        recipe=asdict(job.recipe),
        layers_quantised=len(result.plan.quantised),
        layers_kept=tuple(KeptLayer(layer.name, layer.reason) for layer in result.plan.kept.values()),
        calibration=data.summary() if data else None,
        blocks=result.blocks,
        seconds=result.seconds,
        peak_rss_bytes=peak_resident_bytes(),
        peak_device_bytes=peak_device_bytes(job.device),
        bytes_before=result.prepared.skeleton.checkpoint.nbytes,
        bytes_after=folders[0].bytes,
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        versions={
            "auto_round": auto_round.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        seed=job.recipe.seed,
        signature=result.ready.signature,
        check=verdict.summary() if verdict else None,
        finishing=_finishing(result),
    )


def _finishing(result: Quantised) -> dict[str, float | int | None] | None:
    stats = result.journal.stats(FINISHED) if FINISHED in result.journal else None
    if stats is None:
        return None
    return {"kl_before": stats.loss_start, "kl_after": stats.loss_end, "kept_iteration": stats.kept_iteration}
