"""All that decides the codes of a run, as JSON values: work of one signature is never taken for another's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers

import auto_round
from auto_round.calibrate.dataset import CalibrationSet
from auto_round.pipeline.job import Prepared
from auto_round.source.fingerprint import fingerprint, hash_files

# Where activations lie, and how much memory may be used, change no code.
UNDECIDING = ("low_gpu_mem_usage",)


def signature(prepared: Prepared, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Facts about a run by name.

    Formats, shard size and paths are not among them: the journal holds codes, from which any format that leaves the
    plan as it is can be written. Nor is the number of threads or the kind of processor, which can move a sum in its
    last bit: a run that goes on elsewhere is as good, though its bytes may not be those of the first machine.
    """
    job = prepared.job
    layers = {layer.name: layer.scheme.name if layer.scheme else "kept" for layer in prepared.plan.layers}
    return {
        **original(prepared),
        "calibration": None if calibration is None else calibration.source,
        "calibration sha256": None if calibration is None else calibration.digest,
        "recipe": {name: value for name, value in asdict(job.recipe).items() if name not in UNDECIDING},
        "scheme": prepared.plan.scheme.name,
        "scheme of": layers,
    }


def original(prepared: Prepared) -> dict[str, Any]:
    """Facts about the model as it was given, and about what runs it here."""
    job, source = prepared.job, prepared.source
    return {
        "weights sha256": fingerprint(prepared.skeleton.checkpoint),
        "config.json sha256": hash_files([source.folder / "config.json"]),
        "other files sha256": hash_files(source.extra_files),
        "compute_dtype": str(job.dtype).removeprefix("torch."),
        "device": job.device.type,
        "versions": {
            "auto_round": auto_round.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
