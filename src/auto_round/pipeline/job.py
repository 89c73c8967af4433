"""What a run is asked, what it works on, and what it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from auto_round.calibrate.dataset import CalibrationSet, Dataset
from auto_round.qtensor import QTensor
from auto_round.runtime.events import BlockStats
from auto_round.runtime.journal import Journal
from auto_round.source.opening import Source
from auto_round.source.skeleton import Skeleton
from auto_round.spec.plan import Plan, Rule
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class Job:
    """Everything that decides the result of one run."""

    model: str | Path | PreTrainedModel
    tokenizer: Any | None
    scheme: Scheme
    layer_config: Mapping[str, Rule]
    recipe: Recipe
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype
    quant_lm_head: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Prepared:
    """A job whose model is open and planned: its module tree, its plan, its blocks in the order they run.

    stored_names: layer -> name of its weight in the checkpoint.
    """

    job: Job
    source: Source
    skeleton: Skeleton
    plan: Plan
    blocks: tuple[str, ...]
    stored_names: Mapping[str, str]

    @property
    def outside(self) -> list[str]:
        """Quantised layers that lie in no block."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return [name for name in self.plan.quantised if not name.startswith(prefixes)]


@dataclass(frozen=True)
class Quantised:
    """A finished run: where the model came from, its plan, its codes on disk, and what happened on the way."""

    prepared: Prepared
    journal: Journal
    calibration: CalibrationSet | None
    blocks: tuple[BlockStats, ...]
    seconds: float

    @property
    def job(self) -> Job:
        """What was asked."""
        return self.prepared.job

    @property
    def source(self) -> Source:
        """The original model."""
        return self.prepared.source

    @property
    def plan(self) -> Plan:
        """What every layer became."""
        return self.prepared.plan

    def tensor(self, name: str) -> QTensor:
        """The codes of the layer `name`."""
        return self.journal.get(name)
