"""The record of a run survives JSON, and the copy for the output folder holds nothing that the clock decides."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from auto_round.errors import FormatError
from auto_round.report.record import KeptLayer, RunReport, SavedFolder
from auto_round.runtime.events import BlockStats

BLOCK = BlockStats(0, "model.layers.0", 7, 3e-3, 2e-3, 1e-3, 180, 12.5, 800_000_000)


def a_report(**changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "model": "org/model",
        "folders": (SavedFolder("auto_round", "/somewhere/out", 98_000_000),),
        "scheme": "W4A16G128",
        "bits_per_weight": 4.16,
        "recipe": {"iters": 200, "lr": None},
        "layers_quantised": 14,
        "layers_kept": (KeptLayer("lm_head", "outside the blocks"), KeptLayer("x", "too narrow")),
        "calibration": {"source": "builtin", "digest": "abcdef0123456789", "samples": 32, "tokens": 8192},
        "blocks": (BLOCK, dataclasses.replace(BLOCK, index=1, name="model.layers.1", loss_end=None)),
        "seconds": 321.0,
        "peak_rss_bytes": 1_200_000_000,
        "peak_device_bytes": None,
        "bytes_before": 269_000_000,
        "bytes_after": 98_000_000,
        "device": "cpu",
        "compute_dtype": "float32",
        "versions": {"auto_round": "1.0", "torch": "2.13"},
        "seed": 42,
        "signature": "0123456789abcdef",
        **changes,
    }
    return RunReport(**values)


def test_json_round_trip() -> None:
    report = a_report(peak_device_bytes=5)
    assert RunReport.from_json(report.to_json()) == report
    assert RunReport.from_json(report.to_json()).to_json() == report.to_json()


def test_the_folders_copy_does_not_depend_on_clock_memory_or_place() -> None:
    slow = dataclasses.replace(BLOCK, seconds=99.0, peak_bytes=1)
    other = a_report(
        seconds=1.0,
        peak_rss_bytes=2,
        peak_device_bytes=3,
        folders=(SavedFolder("auto_round", "/elsewhere", 98_000_000),),
        blocks=(slow, dataclasses.replace(slow, index=1, name="model.layers.1", loss_end=None)),
    )
    assert a_report().to_json(measured=False) == other.to_json(measured=False)
    assert a_report().to_json() != other.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 43},
        {"layers_kept": ()},
        {"bits_per_weight": 4.2},
        {"blocks": (dataclasses.replace(BLOCK, loss_end=9.0),)},
    ],
)
def test_the_folders_copy_does_depend_on_the_result(change: dict[str, Any]) -> None:
    assert a_report().to_json(measured=False) != a_report(**change).to_json(measured=False)


def test_a_record_without_measurements_reads_back() -> None:
    report = RunReport.from_json(a_report().to_json(measured=False))
    assert (report.seconds, report.folders[0].path, report.blocks[1].seconds) == (0.0, "", 0.0)
    assert report.blocks[0].loss_end == BLOCK.loss_end


def test_keys_are_sorted_and_every_reader_of_json_takes_it() -> None:
    text = a_report(blocks=(dataclasses.replace(BLOCK, loss_end=math.inf),)).to_json()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["result"]["blocks"][0]["loss_end"] is None
    assert list(record["result"]) == sorted(record["result"])
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not a run report"),
        ("[]", "not a run report"),
        ('{"record": 99}', "version 99"),
        ('{"record": 1, "result": {"blocks": [], "folders": [], "layers_kept": []}}', "missing"),
    ],
)
def test_anything_else_is_refused(text: str, named: str) -> None:
    with pytest.raises(FormatError, match=named):
        RunReport.from_json(text)
