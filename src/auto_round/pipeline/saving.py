"""Writing one format from the codes, and proving that it reads back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import auto_round
from auto_round.errors import FormatError
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
        tensor=result.tensor,
        extra=result.source.extra_files,
        provenance={key: value for key, value in provenance.items() if value is not None},
    )
    output.write(export, folder, largest_shard)
    prove(
        output,
        folder,
        {result.prepared.stored_names[n].removesuffix(".weight"): n for n in result.plan.quantised},
        result,
    )


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
