"""All that decides the codes of a run, as JSON values: work of one signature is never taken for another's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.selftext import words_digest
from auto_round.pipeline.job import Prepared
from auto_round.pipeline.needs import own_texts
from auto_round.source.foreign import foreign

# Where activations lie changes no code.
_UNDECIDING = ("low_gpu_mem_usage",)


def signature(prepared: Prepared, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Facts about a run by name.

    Formats, shard size and paths are not among them: the journal holds codes, from which any format that leaves the
    plan as it is can be written. Nor is the number of threads, the kind of processor or the memory there is (by which
    more or fewer samples go through a block at once), which can move a sum in its last bit: a run that goes on
    elsewhere is as good, though its bytes may not be those of the first machine.
    """
    job = prepared.job
    layers = {layer.name: layer.scheme.name if layer.scheme else "kept" for layer in prepared.plan.layers}
    return {
        **prepared.original,
        "calibration": None if calibration is None else calibration.source,
        "calibration sha256": None if calibration is None else calibration.digest,
        **_words(prepared, calibration),
        "recipe": {name: value for name, value in asdict(job.recipe).items() if name not in _UNDECIDING},
        "scheme": prepared.plan.scheme.name,
        "scheme of": layers,
    }


def _words(prepared: Prepared, calibration: CalibrationSet | None) -> dict[str, str]:
    """What decides the text that the model is yet to write, beside the model and the recipe."""
    tokenizer = prepared.source.tokenizer
    if calibration is None or tokenizer is None or not own_texts(prepared.job, prepared.job.recipe.seqlen):
        return {}
    with foreign(f"{prepared.source.folder}: its tokenizer fails"):
        return {"words of the tokenizer sha256": words_digest(tokenizer)}
