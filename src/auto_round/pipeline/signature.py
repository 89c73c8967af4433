"""All that decides the codes of a run, as JSON values: work of one signature is never taken for another's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.pipeline.job import Prepared

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
        **prepared.original,
        "calibration": None if calibration is None else calibration.source,
        "calibration sha256": None if calibration is None else calibration.digest,
        "recipe": {name: value for name, value in asdict(job.recipe).items() if name not in UNDECIDING},
        "scheme": prepared.plan.scheme.name,
        "scheme of": layers,
    }
