"""The closing table says what a user wants to know, and its snippet is Python."""

from __future__ import annotations

import ast
import dataclasses
import io

import pytest
from rich.console import Console
from tests.report.test_record import BLOCK, a_report

from auto_round.report.record import RunReport, SavedFolder
from auto_round.report.tables import bytes_text, closing_table, loss_summary, seconds_text, snippet


def shown(report: RunReport, width: int = 100) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(closing_table(report), crop=False)
    return output.getvalue()


def test_the_table_names_everything() -> None:
    text = shown(a_report())
    for fact in (
        "269 MB before, 98 MB after, 2.7 times smaller",
        "W4A16G128, 4.16 bits per weight in 14 layers",
        "1 layer: outside the blocks; 1 layer: too narrow",
        "32 samples, 8192 tokens from builtin (sha256 abcdef012345)",
        "5 min 21 s on cpu in float32",
        "1.2 GB",
        "/somewhere/out (auto_round, 98 MB)",
    ):
        assert fact in text


def test_device_memory_and_missing_calibration() -> None:
    text = shown(a_report(peak_device_bytes=7_000_000_000, device="cuda:0", calibration=None))
    assert "1.2 GB, 7 GB on cuda:0" in text
    assert "none needed" in text


def test_what_was_not_measured_is_not_shown() -> None:
    text = shown(RunReport.from_json(a_report().to_json(measured=False)))
    assert "Time" not in text
    assert "memory" not in text


def test_the_snippet_is_python_and_never_wrapped() -> None:
    path = "/a/folder with spaces/and 'quotes'/" + "x" * 80
    calls = [node for node in ast.walk(ast.parse(snippet(path))) if isinstance(node, ast.Constant)]
    assert [node.value for node in calls].count(path) == 2
    report = a_report(folders=(SavedFolder("auto_round", path, 1),))
    assert snippet(path) in "\n".join(line.rstrip() for line in shown(report, width=60).splitlines())


def test_loss_summary_is_a_geometric_mean_over_blocks() -> None:
    first = dataclasses.replace(BLOCK, loss_plain=1.0, loss_start=0.5, loss_end=0.2)
    second = dataclasses.replace(BLOCK, loss_plain=1000.0, loss_start=500.0, loss_end=800.0)
    assert loss_summary([first, second]) == (
        "50% of plain rounding's at the start, 40% at the end (mean over 2 blocks)"
    )
    assert loss_summary([dataclasses.replace(BLOCK, loss_plain=None)]) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (98_362_432, "98.4 MB"),
        (999_700_000, "1 GB"),
        (5e12, "5 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(int(count)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.16, "4.2 s"), (99.99, "1 min 40 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
