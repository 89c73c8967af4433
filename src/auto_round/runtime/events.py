"""What a run tells while it works. The pipeline speaks to one `Listener`; the command line shows it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class BlockStats:
    """One finished block.

    loss_start, loss_end: mean squared error of the block's output, the largest tokens counting less, on the held-out
    samples (on all of the samples when none are held out), with the starting codes and with those kept; loss_plain: the
    same with plain rounding. Of a last block of 2 bits the KL divergence of the model's tokens, in nats, where it can
    be had. None where nothing was measured (round-to-nearest without calibration).
    kept_iteration: the step whose codes were kept, 0 being the start.
    unreached: layers that no calibration token came to (experts), quantised from their weights alone.
    seconds: wall time. peak_bytes: peak memory of the process so far (resident; the device's own on an accelerator).
    """

    index: int
    name: str
    layers: int
    loss_plain: float | None
    loss_start: float | None
    loss_end: float | None
    kept_iteration: int
    seconds: float
    peak_bytes: int
    unreached: int = 0


class Listener(Protocol):
    """Receives the events of one run, in order."""

    def note(self, message: str) -> None:
        """Take one line worth reading."""
        ...

    def warn(self, message: str) -> None:
        """Take one line the user must see."""
        ...

    def begin(self, blocks: int, iters: int, done: int = 0) -> None:
        """Learn that tuning starts: how many blocks, how many steps in each, how many blocks an earlier start did."""
        ...

    def block_started(self, index: int, name: str) -> None:
        """Learn that a block is loaded and its tuning begins."""
        ...

    def step(self, index: int, iteration: int, loss: float) -> None:
        """Learn the training loss of one step (sampled, not necessarily of every step)."""
        ...

    def block_finished(self, stats: BlockStats) -> None:
        """Learn the result of a block."""
        ...

    def end(self) -> None:
        """Learn that tuning is over, whether it succeeded or not."""
        ...

    def finishing(self, iteration: int, iters: int, loss: float) -> None:
        """Learn the training loss of one of `iters` steps in which all scales learn together."""
        ...

    def writing(self, done: int, total: int) -> None:
        """Learn how many of `total` rounds are done, in each of which the model adds a token to some of its texts."""
        ...


class LogListener:
    """The default outside the command line: one log record per block, on the logger ``auto_round``."""

    def __init__(self) -> None:
        self._log = logging.getLogger("auto_round")
        self._blocks = 0

    def note(self, message: str) -> None:
        """Log at level info."""
        self._log.info(message)

    def warn(self, message: str) -> None:
        """Log at level warning."""
        self._log.warning(message)

    def begin(self, blocks: int, iters: int, done: int = 0) -> None:
        """Remember the number of blocks."""
        self._blocks = blocks

    def block_started(self, index: int, name: str) -> None:
        """Say nothing."""

    def step(self, index: int, iteration: int, loss: float) -> None:
        """Say nothing."""

    def block_finished(self, stats: BlockStats) -> None:
        """Log one line."""
        losses = "" if stats.loss_end is None else f": loss {stats.loss_plain:.4g} -> {stats.loss_end:.4g}"
        self._log.info("block %d/%d %s%s in %.1f s", stats.index + 1, self._blocks, stats.name, losses, stats.seconds)

    def end(self) -> None:
        """Say nothing."""

    def finishing(self, iteration: int, iters: int, loss: float) -> None:
        """Log about ten of the steps."""
        if iteration % max(1, iters // 10) == 0:
            self._log.info("finishing: step %d/%d, KL divergence %.4f", iteration + 1, iters, loss)

    def writing(self, done: int, total: int) -> None:
        """Log ten of the rounds."""
        if done * 10 // total > (done - 1) * 10 // total:
            self._log.info("writing: round %d/%d", done, total)
