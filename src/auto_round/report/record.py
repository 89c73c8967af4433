"""The record of one run, and its JSON.

The JSON keeps apart what the inputs decide and what the clock and the machine's memory decide:

    {"record": 1,
     "result":   {"model": ..., "blocks": [{"loss_end": ...}, ...], "folders": [{"format", "bytes"}], ...},
     "measured": {"seconds": ..., "peak_rss_bytes": ..., "blocks": [{"seconds", "peak_bytes"}, ...], "folders": [path]}}

The copy in the output folder has no "measured", so that the same seed gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.errors import FormatError
from auto_round.runtime.events import BlockStats

RECORD_VERSION = 1
MEASURED = ("seconds", "peak_rss_bytes", "peak_device_bytes")
MEASURED_OF_BLOCK = ("seconds", "peak_bytes")
MEASURED_OF_FOLDER = ("path",)


@dataclass(frozen=True)
class SavedFolder:
    """One output: its format, where it lies, and the bytes in it."""

    format: str
    path: str
    bytes: int


@dataclass(frozen=True)
class KeptLayer:
    """A Linear that was not quantised, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class RunReport:
    """What one run was asked, what came out and what it took.

    recipe: the fields of the `Recipe`. calibration: source, digest, samples and tokens of the set; None when the run
    needed none. bytes_before, bytes_after: weight files of the original, and the first output folder. seconds: wall
    time. peak_device_bytes: None on a CPU. signature: SHA-256 of all that decided the result, so that the same job
    is known again. check: how near the result is to the original, by each way of running it; None when not compared.
    finishing: KL divergence on its held-out samples before and after the stage, and the step kept; None without one.
    A record read from JSON without "measured" has 0 and "" in those fields.
    """

    model: str
    folders: tuple[SavedFolder, ...]
    scheme: str
    bits_per_weight: float
    recipe: Mapping[str, Any]
    layers_quantised: int
    layers_kept: tuple[KeptLayer, ...]
    calibration: Mapping[str, Any] | None
    blocks: tuple[BlockStats, ...]
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    bytes_before: int
    bytes_after: int
    device: str
    compute_dtype: str
    versions: Mapping[str, str]
    seed: int
    signature: str
    check: Mapping[str, Any] | None = None
    finishing: Mapping[str, Any] | None = None

    def to_json(self, measured: bool = True) -> str:
        """Return the record as JSON with sorted keys; without times, memory and paths unless `measured`."""
        result = _plain(dataclasses.asdict(self))
        numbers = _split(result, MEASURED)
        numbers["blocks"] = [_split(block, MEASURED_OF_BLOCK) for block in result["blocks"]]
        numbers["folders"] = [_split(folder, MEASURED_OF_FOLDER) for folder in result["folders"]]
        record = {"record": RECORD_VERSION, "result": result, **({"measured": numbers} if measured else {})}
        return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        """Read what `to_json` wrote; raise FormatError for anything else."""
        try:
            record = json.loads(text)
            if record["record"] != RECORD_VERSION:
                raise FormatError(f"run report of version {record['record']}; this release reads {RECORD_VERSION}")
            result, numbers = record["result"], record.get("measured") or _nothing_measured(record["result"])
            blocks = [{**kept, **more} for kept, more in zip(result["blocks"], numbers["blocks"], strict=True)]
            folders = [{**kept, **more} for kept, more in zip(result["folders"], numbers["folders"], strict=True)]
            values = {
                **result,
                **numbers,
                "blocks": tuple(BlockStats(**block) for block in blocks),
                "folders": tuple(SavedFolder(**folder) for folder in folders),
                "layers_kept": tuple(KeptLayer(**layer) for layer in result["layers_kept"]),
            }
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a run report of auto-round: {error}") from None


def _split(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take `names` out of `values` and return them."""
    return {name: values.pop(name) for name in names}


def _nothing_measured(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seconds": 0.0,
        "peak_rss_bytes": 0,
        "peak_device_bytes": None,
        "blocks": [{"seconds": 0.0, "peak_bytes": 0}] * len(result["blocks"]),
        "folders": [{"path": ""}] * len(result["folders"]),
    }


def _plain(value: Any) -> Any:
    """Copy into what JSON has; numbers that are not finite become null, since JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
