"""A run while it works, on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from auto_round.report.tables import bytes_text, seconds_text
from auto_round.runtime.events import BlockStats

# Two cores have better things to do than to redraw; a step takes longer than this anyway.
REDRAWS_PER_SECOND = 4
REDRAW = 1 / REDRAWS_PER_SECOND  # seconds
QUIET_LINES = 30.0  # seconds between lines where nobody watches


def remaining_seconds(finished: list[float], blocks: int, current: float, share: float) -> float | None:
    """Time until the last of `blocks` is done; None when nothing is known yet.

    finished: seconds of each finished block. current: seconds spent on the block at work. share: the part of its steps
    that are done, 0 .. 1; it stands in for a finished block while there is none.
    """
    left = blocks - len(finished)
    if finished:
        return max(left * sum(finished) / len(finished) - current, 0.0)
    return current / share * left - current if share > 0 else None


class _Pace:
    """How long equal pieces of work will still take, and when that is worth saying again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work, self._began, self._said = ("", 0), 0.0, 0.0
        self._first = self._last = 0

    def left(self, work: str, done: int, total: int) -> float:
        """Seconds for what is left, `done` pieces being done just now; what was done before the first call is free."""
        if self._work != (work, total) or done < self._last:
            self._work, self._first = (work, total), done
            self._began = self._said = self._clock()
        self._last = done
        return (self._clock() - self._began) / max(done - self._first, 1) * (total - done)

    def due(self, every: float) -> bool:
        """True when this was not so for `every` seconds."""
        if self._clock() - self._said < every:
            return False
        self._said = self._clock()
        return True


class LiveListener:
    """Shows the events of a run.

    console: where to, standard error when None. quiet: warnings only. clock: seconds, for tests.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._clock = clock
        self._arrow = "->" if self._console.options.ascii_only else "→"
        self._blocks = self._iters = self._done = 0
        self._finished: list[float] = []
        self._started = 0.0
        self._peak = 0
        self._pace = _Pace(clock)
        self._replaced = 0  # characters of a line that the next one replaces
        self._bars: Progress | None = None
        self._block_bar = self._step_bar = TaskID(0)

    def note(self, message: str) -> None:
        """Print a dim line."""
        if not self._quiet:
            self._line(message, "dim")

    def warn(self, message: str) -> None:
        """Print a yellow line, also when quiet."""
        self._line(f"warning: {message}", "yellow")

    def begin(self, blocks: int, iters: int, done: int = 0) -> None:
        """Start the bars."""
        self._blocks, self._iters, self._finished, self._peak = blocks, iters, [], 0
        self._done = min(done, blocks)
        if self._quiet or not self._console.is_terminal:
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", style="dim"),
            console=self._console,
            refresh_per_second=REDRAWS_PER_SECOND,
            transient=True,
        )
        self._block_bar = self._bars.add_task("blocks", total=blocks, facts="")
        self._step_bar = self._bars.add_task("steps", total=iters, facts="", visible=iters > 0)
        self._bars.start()

    def block_started(self, index: int, name: str) -> None:
        """Name the block at work."""
        self._started = self._clock()
        if self._bars is not None:
            label = f"block {index + 1}/{self._blocks} {name}"
            self._bars.update(self._block_bar, description=label, completed=index, facts=self._facts(0.0))
            self._bars.update(self._step_bar, description="", completed=0, facts="")
            self._bars.refresh()

    def step(self, index: int, iteration: int, loss: float) -> None:
        """Move the bar of the block's steps and show the loss."""
        if self._bars is not None:
            done = iteration + 1
            self._bars.update(self._step_bar, description=f"step {done}/{self._iters}", completed=done)
            self._bars.update(self._step_bar, facts=f"loss {loss:.3g}")
            self._bars.update(self._block_bar, facts=self._facts(done / max(self._iters, 1)))

    def block_finished(self, stats: BlockStats) -> None:
        """Print one line on the block."""
        self._finished.append(stats.seconds)
        self._peak = max(self._peak, stats.peak_bytes)
        self._started = self._clock()
        if self._quiet:
            return
        line = self.summary(stats)
        if self._bars is None:
            left = remaining_seconds(self._finished, self._blocks - self._done, 0.0, 0.0)
            line += f"  ({seconds_text(left)} left)" if left else ""
        else:
            self._bars.update(self._block_bar, completed=stats.index + 1, facts=self._facts(0.0))
        self._line(line)

    def end(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def finishing(self, iteration: int, iters: int, loss: float) -> None:
        """Show one bar over all steps, or about ten lines where there is no terminal."""
        if self._quiet:
            return
        left = self._pace.left("finishing", iteration + 1, iters)
        if self._console.is_terminal or iteration % max(1, iters // 10) == 0:
            text = f"finishing: step {iteration + 1}/{iters}  KL {loss:.3g}  {seconds_text(left)} left"
            self._counted(text, last=iteration + 1 == iters)

    def writing(self, done: int, total: int) -> None:
        """Show one line that counts, or a line every half a minute where there is no terminal."""
        left = self._pace.left("writing", done, total)
        if self._quiet or not (done == total or self._pace.due(REDRAW if self._console.is_terminal else QUIET_LINES)):
            return
        self._counted(f"writing: {done / total:.0%}  {seconds_text(left)} left", last=done == total)

    def summary(self, stats: BlockStats) -> str:
        """One line on a finished block: its losses with plain rounding, at the start and at the end, and its time."""
        losses = [f"{loss:.3g}" for loss in (stats.loss_plain, stats.loss_start, stats.loss_end) if loss is not None]
        text = f"  loss {f' {self._arrow} '.join(losses)}" if losses else ""
        return f"block {stats.index + 1}/{self._blocks}{text}  {seconds_text(stats.seconds)}"

    def _facts(self, share: float) -> str:
        left = remaining_seconds(self._finished, self._blocks - self._done, self._clock() - self._started, share)
        facts = [] if left is None else [f"{seconds_text(left)} left"]
        return "  ".join(facts + ([f"peak {bytes_text(self._peak)}"] if self._peak else []))

    def _counted(self, text: str, *, last: bool) -> None:
        """One line that the next one replaces, where there is a terminal."""
        replaced = self._console.is_terminal and not last
        self._console.print(Text(text.ljust(self._replaced)), soft_wrap=True, end="\r" if replaced else "\n")
        self._replaced = len(text) if replaced else 0

    def _line(self, message: str, style: str = "") -> None:
        self._console.print(Text(message.ljust(self._replaced), style=style), soft_wrap=True)
        self._replaced = 0
