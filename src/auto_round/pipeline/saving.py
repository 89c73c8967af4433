"""Writing one format from the codes, and proving that it reads back."""

from __future__ import annotations

from pathlib import Path

import auto_round
from auto_round.formats.base import Export, Format
from auto_round.pipeline.job import Quantised


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
        stored_names=result.prepared.stored_names,
        replaced={stored: name for name, stored in result.prepared.stored_names.items()},
        tensor=result.tensor,
        weight=lambda name: result.tensor(name).dequantize(),
        extra=result.source.extra_files,
        provenance={key: value for key, value in provenance.items() if value is not None},
    )
    output.write(export, folder, largest_shard)
    output.prove(export, folder)
