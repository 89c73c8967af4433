"""Writing one format from the codes, and proving that it reads back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import auto_round
from auto_round.calibrate.dataset import CalibrationSet
from auto_round.formats.base import Export, Format
from auto_round.pipeline.job import Prepared, Quantised
from auto_round.pipeline.planning import untied
from auto_round.qtensor import QuantTensor, from_blocks, to_blocks


def save(result: Quantised, output: Format, folder: Path, largest_shard: int | None) -> None:
    """Write one format into the empty folder `folder` and prove that every layer reads back as it was tuned.

    Raises FormatError naming the layer that does not.
    """
    export = export_of(result.prepared, result.calibration, result.tensor)
    output.write(export, folder, largest_shard)
    output.prove(export, folder)


def blank_export(prepared: Prepared) -> Export:
    """What a format needs to tell the sizes of its files, before there are codes."""

    def no_codes(name: str) -> QuantTensor:
        raise AssertionError(f"the codes of {name!r} were asked for before they are made")

    return export_of(prepared, None, no_codes)


def export_of(prepared: Prepared, data: CalibrationSet | None, tensor: Callable[[str], QuantTensor]) -> Export:
    """All that a format needs to write the model, `tensor` giving the codes of a layer."""
    recipe = prepared.job.recipe
    provenance = {
        "autoround_version": auto_round.__version__,
        "iters": recipe.iters,
        "seed": recipe.seed,
        "dataset": data.source if data else None,
        "dataset_sha256": data.digest if data else None,
    }
    return Export(
        checkpoint=prepared.source.checkpoint,
        config=_config(prepared),
        plan=prepared.plan,
        stored_names=prepared.stored_names,
        replaced={stored: name for name, stored in prepared.stored_names.items()},
        tensor=lambda name: from_blocks(tensor(name)),
        weight=lambda name: tensor(name).dequantize(),
        extra=prepared.source.extra_files,
        provenance={key: value for key, value in provenance.items() if value is not None},
        title=prepared.source.title,
        tokenizer=prepared.source.tokenizer,
        blocks=lambda name: to_blocks(tensor(name)),
        transposed=frozenset(name for name in prepared.plan.quantised if prepared.skeleton.is_conv1d(name)),
    )


def _config(prepared: Prepared) -> dict[str, Any]:
    """The source's config.json, which must not tie what the output holds twice."""
    config = prepared.source.raw_config
    if untied(prepared.plan, prepared.skeleton):
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config
