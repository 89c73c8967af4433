"""What a run is asked, what it works on, and what it ends in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import auto_round
from auto_round.calibrate.dataset import CalibrationSet, Dataset
from auto_round.formats.base import Format
from auto_round.qtensor import QuantTensor
from auto_round.runtime.events import BlockStats
from auto_round.runtime.journal import Journal
from auto_round.source.fingerprint import fingerprint, hash_files
from auto_round.source.opening import Source, title_of
from auto_round.source.skeleton import Skeleton
from auto_round.spec.plan import Plan, Rule
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class Job:
    """Everything that decides the result of one run, and the memory it may use, which does not.

    dtype_measured: `dtype` was not asked for but found fastest. max_memory: bytes that may be resident, None for what
    there is. activations_on_disk: keep them in mapped files from the start, not only when memory is short.
    """

    model: str | Path | PreTrainedModel
    tokenizer: Any | None
    scheme: Scheme
    layer_config: Mapping[str, Rule]
    recipe: Recipe
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype
    dtype_measured: bool = False
    quant_lm_head: bool = False
    quant_nontext_module: bool = False
    processor: Any | None = None
    ignore_layers: tuple[str, ...] = ()
    to_quant_block_names: tuple[str, ...] = ()
    trust_remote_code: bool = False
    max_memory: int | None = None
    activations_on_disk: bool = False

    @property
    def model_name(self) -> str:
        """What the user called the model; of a loaded one, what it was loaded from."""
        return title_of(self.model)


@dataclass(frozen=True)
class Saving:
    """How the result is written.

    formats: one goes into the output folder itself, several into a subfolder each. largest_shard: bytes of a weight
    file, None for the format's own limit. overwrite: replace another job's output or unfinished work. max_kl: KL
    divergence from the original, in nats, above which a result is bad; None when it is not to be compared.
    """

    formats: tuple[Format, ...]
    largest_shard: int | None
    overwrite: bool
    max_kl: float | None


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

    @cached_property
    def original(self) -> Mapping[str, Any]:
        """Facts, as JSON values, about the model as it was given, and about what runs it here."""
        return {
            "weights sha256": fingerprint(self.skeleton.checkpoint),
            "config.json sha256": hash_files([self.source.folder / "config.json"]),
            "other files sha256": hash_files(self.source.extra_files),
            "compute_dtype": str(self.job.dtype).removeprefix("torch."),
            "device": self.job.device.type,
            "versions": {
                "auto_round": auto_round.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    @property
    def outside(self) -> list[str]:
        """Quantised layers that lie in no block."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return [name for name in self.plan.quantised if not name.startswith(prefixes)]

    def inside(self, block: str) -> list[str]:
        """Quantised layers of one block."""
        return [name for name in self.plan.quantised if name.startswith(f"{block}.")]

    @property
    def last_by_tokens(self) -> bool:
        """True when the last block is to be tuned by the tokens that come of it, see `Recipe.by_tokens`."""
        schemes = (self.plan.quantised[name].scheme for name in self.inside(self.blocks[-1]))
        return any(scheme is not None and self.job.recipe.by_tokens(scheme.bits) for scheme in schemes)


@dataclass(frozen=True)
class Ready:
    """A prepared model with its calibration set (None where none is needed), and all that decides the result.

    Facts are known before the model writes samples of its own: until then these are blank.
    """

    prepared: Prepared
    calibration: CalibrationSet | None
    facts: Mapping[str, Any]

    @property
    def signature(self) -> str:
        """SHA-256 of the facts, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Quantised:
    """A finished run: what it was, its codes on disk, and what happened on the way. seconds: of this process."""

    ready: Ready
    journal: Journal
    blocks: tuple[BlockStats, ...]
    seconds: float

    @property
    def prepared(self) -> Prepared:
        """The planned model."""
        return self.ready.prepared

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

    @property
    def calibration(self) -> CalibrationSet | None:
        """What it was tuned on."""
        return self.ready.calibration

    def tensor(self, name: str) -> QuantTensor:
        """The codes of the layer `name`."""
        return self.journal.get(name)
