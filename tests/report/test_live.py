"""What a run shows: lines where nobody watches, bars on a terminal, warnings always."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest
from rich.console import Console

from auto_round.report.live import LiveListener, remaining_seconds
from auto_round.runtime.events import BlockStats, Listener

STATS = BlockStats(2, "model.layers.2", 7, 3.21e-3, 2e-3, 1.5e-3, 180, 12.5, 800_000_000)


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_run(terminal: bool, quiet: bool = False, clock: Clock | None = None) -> str:
    """Two of 30 blocks, and what was printed."""
    clock = clock or Clock()
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None, legacy_windows=False)
    listener: Listener = LiveListener(console, quiet=quiet, clock=clock)
    listener.note("a note")
    listener.warn("beware")
    listener.begin(30, 200)
    listener.block_started(1, "model.layers.1")
    clock.now += 5.0
    listener.step(1, 99, 0.0123)
    clock.now += 5.0
    listener.block_finished(dataclasses.replace(STATS, index=1, seconds=10.0))
    listener.block_started(2, "model.layers.2")
    listener.block_finished(dataclasses.replace(STATS, loss_plain=None, loss_start=None, loss_end=None))
    listener.end()
    return output.getvalue()


def test_lines_without_a_terminal() -> None:
    assert a_run(terminal=False).splitlines() == [
        "a note",
        "warning: beware",
        "block 2/30  loss 0.00321 → 0.002 → 0.0015  10.0 s  (4 min 50 s left)",
        "block 3/30  12.5 s  (5 min 15 s left)",
    ]


def test_quiet_leaves_warnings() -> None:
    assert a_run(terminal=False, quiet=True) == "warning: beware\n"
    assert a_run(terminal=True, quiet=True) == "warning: beware\n"


def test_bars_show_block_step_loss_memory_and_the_time_left() -> None:
    shown = a_run(terminal=True)
    assert "block 2/30 model.layers.1" in shown
    assert "block 3/30 model.layers.2" in shown
    assert "peak 800 MB" in shown
    assert "4 min 50 s left" in shown
    assert "block 2/30  loss 0.00321 → 0.002 → 0.0015  10.0 s\n" in shown


def test_steps_and_loss_on_a_terminal() -> None:
    output = io.StringIO()
    clock = Clock()
    listener = LiveListener(Console(file=output, force_terminal=True, width=200), clock=clock)
    listener.begin(4, 200)
    listener.block_started(0, "b")
    clock.now = 5.0
    listener.step(0, 99, 0.0123)
    assert listener._bars is not None
    listener._bars.refresh()
    listener.end()
    assert "step 100/200" in output.getvalue()
    assert "loss 0.0123" in output.getvalue()
    assert "35.0 s left" in output.getvalue()  # half of the first of four blocks took 5 s


def test_one_listener_takes_several_runs() -> None:
    listener = LiveListener(Console(file=io.StringIO(), force_terminal=True))
    for blocks in (2, 3):
        listener.begin(blocks, 0)
        listener.block_started(0, "b")
        listener.block_finished(dataclasses.replace(STATS, index=0))
        listener.end()
    assert listener.summary(STATS).startswith("block 3/3")


@pytest.mark.parametrize("terminal", [True, False])
def test_writing_counts_and_says_what_is_left(terminal: bool) -> None:
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None, legacy_windows=False)
    listener = LiveListener(console, clock=clock)
    for done in range(1, 101):  # a second for each
        clock.now += 1.0
        listener.writing(done, 100)
    lines = output.getvalue().replace("\r", "\n").splitlines()
    assert lines[-1].rstrip() == "writing: 100%  0.0 s left"
    assert (lines[0], len(lines)) == (
        ("writing: 2%  98.0 s left", 99) if terminal else ("writing: 31%  69.0 s left", 4)
    )
    if terminal:  # what is left of a longer line is wiped out
        assert all(len(line) >= len(before.rstrip()) for before, line in itertools.pairwise(lines))
    listener.finishing(0, 8, 0.5)
    assert output.getvalue().rstrip().endswith("finishing: step 1/8  KL 0.5  0.0 s left")


@pytest.mark.parametrize(
    ("finished", "current", "share", "expected"),
    [
        ([], 0.0, 0.0, None),
        ([], 4.0, 0.25, 12.0 + 9 * 16.0),
        ([10.0, 20.0], 0.0, 0.5, 8 * 15.0),
        ([10.0, 20.0], 5.0, 0.5, 8 * 15.0 - 5.0),
        ([1.0] * 9, 30.0, 0.5, 0.0),
    ],
)
def test_time_left(finished: list[float], current: float, share: float, expected: float | None) -> None:
    assert remaining_seconds(finished, 10, current, share) == expected
