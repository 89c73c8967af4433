"""Before any work: open the model, see that it is whole, and decide what happens to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from auto_round.errors import SourceError
from auto_round.formats.base import Format
from auto_round.pipeline.job import Job, Prepared
from auto_round.pipeline.planning import block_lists, plan_layers
from auto_round.source.blocks import block_names
from auto_round.source.opening import open_source
from auto_round.source.recast import Recast, output_name
from auto_round.source.skeleton import Skeleton


def prepare(job: Job, formats: Sequence[Format], scratch: Path) -> Prepared:
    """Open the model from its headers and plan every layer; no weight is read.

    formats: those the result is meant for; a layer that one of them cannot hold is kept. scratch: where a loaded model
    or a GGUF file is unpacked. Raises SourceError or SpecError.
    """
    source = open_source(
        job.model, job.tokenizer, scratch, processor=job.processor, trust_remote_code=job.trust_remote_code
    )
    skeleton = Skeleton(source.config, source.checkpoint, trust_remote_code=job.trust_remote_code)
    _check_complete(skeleton)
    lists = block_lists(job, skeleton)
    blocks = block_names(skeleton.model, lists)
    plan = plan_layers(job, source, skeleton, lists, blocks, formats)
    stored = {name: f"{output_name(skeleton, name)}.weight" for name in plan.quantised}
    source = replace(source, checkpoint=Recast(skeleton, plan.quantised))
    return Prepared(job, source, skeleton, plan, tuple(blocks), stored)


def _check_complete(skeleton: Skeleton) -> None:
    missing = skeleton.missing()
    if missing:
        raise SourceError(
            f"{skeleton.checkpoint.folder}: {len(missing)} parameters of {type(skeleton.model).__name__} are not in "
            f"the checkpoint, such as {missing[0]!r}; it is incomplete or its config.json is of another model"
        )
