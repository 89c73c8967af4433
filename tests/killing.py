"""Runs of a tiny model that are killed, each in a forked process so that nothing is imported twice.

Run as a program it reads one JSON list of runs from standard input and prints one exit code a line:
{"model", "output", "log", "settings", "saving", and when to die: "after" seconds or the "call" to the disk}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
TEXTS = ["the quick brown fox jumps over the lazy dog. " * 4, "pack my box with five dozen liquor jugs! " * 4] * 4
SETTINGS: dict[str, Any] = {
    "group_size": 32,
    "iters": 3,
    "nsamples": 8,
    "seqlen": 32,
    "batch_size": 4,
    "dataset": TEXTS,
    "device": "cpu",
    "compute_dtype": "float32",
}
# What every step of a run that must survive a power cut goes through.
CALLS = ("fsync", "rename", "rmdir", "unlink")


def runs(jobs: list[dict[str, Any]]) -> list[int]:
    """Do the runs one after another in a process of their own; exit codes as subprocess gives them."""
    words = [sys.executable, "-m", "tests.killing"]
    done = subprocess.run(words, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(line) for line in done.stdout.split()]


def started(log: Path) -> list[str]:
    """Every "started N" and "finished N" of all the runs that shared a log, in order."""
    return log.read_text().splitlines()


def wasted(log: Path) -> int:
    """How many times a block was begun beyond the first; a block that was finished must not be begun again."""
    seen: list[str] = []
    for line in started(log):
        assert line.replace("started", "finished") not in seen, f"{line} though it was finished"
        seen.append(line)
    starts = [line for line in seen if line.startswith("started")]
    return len(starts) - len(set(starts))


def die_at_call(number: int) -> None:
    """Send this process SIGKILL in front of its `number`-th call to the disk that changes or forces something."""
    left = [number]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def _work(job: dict[str, Any]) -> None:
    import auto_round
    from auto_round.runtime.events import LogListener

    class Noting(LogListener):
        def _note(self, line: str) -> None:
            with Path(job["log"]).open("a") as f:
                f.write(line + "\n")

        def block_started(self, index: int, name: str) -> None:
            self._note(f"started {index}")

        def block_finished(self, stats: Any) -> None:
            self._note(f"finished {stats.index}")

    if "call" in job:
        die_at_call(job["call"])
    tuner = auto_round.AutoRound(job["model"], **{**SETTINGS, **job.get("settings", {})}, listener=Noting())
    tuner.quantize_and_save(job["output"], **job.get("saving", {}))


def _fork(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _work(job)
            code = 0
        finally:  # never back into the parent's code
            if code:
                traceback.print_exc()
            os._exit(code)
    if "after" in job:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import torch

    import auto_round  # loaded before the first fork
    import auto_round.pipeline  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for each in json.load(sys.stdin):
        print(_fork(each), flush=True)
