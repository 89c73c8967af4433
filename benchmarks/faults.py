"""What survives: a real run killed at random moments, stopped, out of disk, and without a folder to write to.

    python -m benchmarks.faults MODEL [--kills 50] [--blocks 4] [--more SEED]
                                                           (from the repository's root; root for the full disk)

MODEL: a folder of safetensors, of which the first blocks are taken. Writes benchmarks/results/faults.json; with --more
only kills, at other moments, which are added to the kept result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import killing

from auto_round.source.checkpoint import Checkpoint
from auto_round.source.opening import WEIGHT_SUFFIXES

RESULT = Path(__file__).parent / "results" / "faults.json"
TEXT = Path(__file__).parents[1] / "src" / "auto_round" / "evaluate" / "text.txt"
TUNING = {"iters": 3, "nsamples": 4, "seqlen": 32, "group_size": 64, "batch_size": 4, "start": "plain"}
FIXED = {"compute_dtype": "float32", "device": "cpu", "dataset": str(TEXT)}
SEED = 2026
# The comparison with the original takes most of a run this short; the suite kills runs in it, this does not.
UNCHECKED = {"enable_check": False}


def cut(model: Path, blocks: int, folder: Path) -> Path:
    """A folder with the first `blocks` blocks of a model."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(model)
    gone = tuple(f"model.layers.{i}." for i in range(blocks, 1000))
    kept = {name: checkpoint.tensor(name) for name in checkpoint if not name.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, "index.json")) and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def kills(model: Path, place: Path, expected: dict[str, str], seconds: float, count: int, seed: int) -> dict[str, Any]:
    """`count` outputs, each of a run that is killed (every third one twice) and then left to finish."""
    draw = random.Random(seed)
    jobs, ends = [], []
    for number in range(count):
        log, output = str(place / f"log{number}"), str(place / f"kill{number}")
        job = {"model": str(model), "output": output, "log": log, "settings": {**TUNING, **FIXED}}
        job["saving"] = UNCHECKED
        jobs += [{**job, "after": draw.uniform(0, 1.05 * seconds)} for _ in range(2 if number % 3 == 0 else 1)]
        jobs.append(job)
        ends.append(len(jobs) - 1)
    codes = killing.runs(jobs)
    logs = [place / f"log{number}" for number in range(count)]
    return {
        "outputs": count,
        "killed": codes.count(killing.KILLED),
        "finished_before_the_kill": codes.count(0) - count,
        "other_exit_codes": [code for code in codes if code not in (0, killing.KILLED)],
        "identical": sum(hashes(place / f"kill{number}") == expected for number in range(count)),
        "blocks_begun_again_while_in_flight": sum(killing.wasted(log) for log in logs if log.exists()),
        "finished_blocks_begun_again": 0,  # `wasted` fails if there is one
        "left_behind": sorted(item.name for item in place.iterdir() if item.name.startswith(".")),
    }


def command(model: Path, output: Path) -> list[str]:
    """The same run as the command line's."""
    flags = [word for name, value in {**TUNING, **FIXED}.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "auto_round", str(model), "--output_dir", str(output), "--disable_check", *flags]


def told(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Exit code and last line of what it said."""
    lines = process.stderr.strip().splitlines()
    return {
        "exit_code": process.returncode,
        "said": " ".join(lines[-2:])[-400:],
        "traceback": "Traceback" in process.stderr,
    }


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(words, capture_output=True, text=True, check=False)


def signalled(model: Path, place: Path, expected: dict[str, str]) -> list[dict[str, Any]]:
    """Ctrl-C or SIGTERM in the middle, then the same command."""
    found = []
    for sent in (signal.SIGTERM, signal.SIGINT):
        output = place / f"signal{sent}"
        process = subprocess.Popen(command(model, output), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        work = output.with_name(f".{output.name}.auto-round") / "blocks"
        while not list(work.glob("*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sent)
        _, errors = process.communicate()
        first = told(subprocess.CompletedProcess([], process.returncode, "", errors))
        second = run(command(model, output))
        found.append({"signal": sent.name, **first, "then": second.returncode, "identical": hashes(output) == expected})
    return found


@contextmanager
def small_disk(size: str, *, read_only: bool = False) -> Iterator[Path]:
    """A file system of its own in memory."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            if read_only:
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def full_disk(model: Path, expected: dict[str, str], stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """Somebody else fills the disk when the run has come to a stage; space is made, and the same command goes on."""
    found = []
    for stage in stages:
        with small_disk("600M") as disk:
            process = subprocess.Popen(
                command(model, disk / "out"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            work = disk / ".out.auto-round"
            while not list(work.glob(stage)) and process.poll() is None:
                time.sleep(0.005)
            fill(disk / "filler")
            _, errors = process.communicate()
            first = told(subprocess.CompletedProcess([], process.returncode, "", errors))
            kept = len(list((work / "blocks").glob("*.safetensors")))
            (disk / "filler").unlink()
            second = run(command(model, disk / "out"))
            found.append(
                {"full_from": stage, **first, "blocks_kept": kept, "then": second.returncode}
                | {"identical": (disk / "out").is_dir() and hashes(disk / "out") == expected}
            )
    return found


def fill(file: Path) -> None:
    """Write until nothing more fits."""
    with file.open("wb", buffering=0) as f:
        try:
            while True:
                if f.write(bytes(1 << 16)) < 1 << 16:
                    return
        except OSError:
            return


def main() -> None:
    """Do everything and keep the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--more", type=int, metavar="SEED", help="of the moments; other than before")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = cut(given.model, given.blocks, place / "model")
        job = {"model": str(model), "log": str(place / "log"), "settings": {**TUNING, **FIXED}, "saving": UNCHECKED}
        assert killing.runs([{**job, "output": str(place / "first")}]) == [0]
        started = time.monotonic()
        assert killing.runs([{**job, "output": str(place / "second")}, {**job, "output": str(place / "third")}]) == [
            0,
            0,
        ]
        seconds = (time.monotonic() - started) / 2
        expected = hashes(place / "first")
        assert hashes(place / "second") == expected
        if given.more is not None:
            kept = json.loads(RESULT.read_text())
            more = kills(model, place, expected, seconds, given.kills, given.more)
            kept["kills"] = {name: kept["kills"][name] + more[name] for name in more}
            RESULT.write_text(json.dumps(kept, indent=2) + "\n")
            print(json.dumps(kept["kills"]))
            return
        result = {
            "model": f"{given.model.name}, its first {given.blocks} blocks",
            "settings": TUNING,
            "seconds_of_one_run": round(seconds, 2),
            "kills": kills(model, place, expected, seconds, given.kills, SEED),
        }
        print(json.dumps(result, indent=1), flush=True)
        result["signals"] = signalled(model, place, expected)
    with tempfile.TemporaryDirectory() as folder:
        model = cut(given.model, given.blocks, Path(folder) / "model")
        assert run(command(model, Path(folder) / "first")).returncode == 0
        expected = hashes(Path(folder) / "first")
        if os.geteuid() == 0:
            stages = (
                "job.json",
                "blocks/block-00000.safetensors",
                "blocks/block-00001.safetensors",
                "output",
                "output/model*",
            )
            result["full_disk"] = full_disk(model, expected, stages)
            with small_disk("20M") as disk:
                result["disk_too_small_from_the_start"] = told(run(command(model, disk / "out")))
            with small_disk("600M", read_only=True) as disk:
                result["read_only"] = told(run(command(model, disk / "out")))
    result["seconds"] = round(time.monotonic() - begin)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
