"""Decoding and prefill of one model on this CPU: dense, every backend, the peer and llama.cpp, in one run.

    python benchmarks/inference.py MODEL --work FOLDER [--small MODEL] [--peer PYTHON] [--llama PYTHON --gguf FILE]
                                   [--cases NAME,...]

Each case is a process of its own (inference_case.py). Results go to ``--out`` as JSON, with a table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round import AutoRound
from auto_round.inference.kernels.native import INSTRUCTION_SETS, Library, library

CASE = Path(__file__).with_name("inference_case.py")
BITS = (4, 2, 3, 8)
LONGEST_SECONDS = 240
# Each thread stays on a core of its own: where others run too, both may otherwise share one and wait for each other.
# Not for other environments: ARK brings an OpenMP of its own, and torch's is left with one core when both bind threads.
BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}


@dataclass(frozen=True)
class Case:
    """One row: the folder (or GGUF file), the interpreter, and the words for inference_case.py."""

    name: str
    folder: Path
    python: Path
    words: tuple[str, ...] = ()


def quantised(model: Path, work: Path, bits: int) -> Path:
    """The folder of `model` rounded to `bits` bits in groups of 128, made if it is not there."""
    folder = work / f"{model.name}-w{bits}g128"
    if not folder.exists():
        AutoRound(model, bits=bits, group_size=128, recipe="rtn").quantize_and_save(folder, enable_check=False)
    return folder


def cases(model: Path, work: Path, args: argparse.Namespace) -> list[Case]:
    """All that can be compared here."""
    here = Path(sys.executable)
    folders = {bits: quantised(model, work, bits) for bits in BITS}
    rows = [Case(dtype, model, here, ("--dtype", dtype)) for dtype in ("bfloat16", "float32")]
    rows += [Case(f"native {bits} bits", folders[bits], here) for bits in BITS]
    eight = ("--head_bits", "8")
    rows += [
        Case("native 4 bits, 8-bit head", folders[4], here, eight),
        Case("native 2 bits, 8-bit head", folders[2], here, eight),
    ]
    if args.peer:
        rows.append(Case("auto-round 0.16.1 with ARK, 4 bits", folders[4], args.peer))
    if args.llama and args.gguf:
        rows.append(Case(f"llama.cpp {args.gguf.name}", args.gguf, args.llama, ("--kind", "llama")))
    rows += [
        Case("native 4 bits, compiled", folders[4], here, ("--compile",)),
        Case("native 4 bits, 8-bit head, compiled", folders[4], here, (*eight, "--compile")),
        Case("native 4 bits, AVX2 alone", folders[4], here, ("--isa", str(INSTRUCTION_SETS.index("AVX2")))),
        Case("int4pack 4 bits", folders[4], here, ("--backend", "int4pack")),
        Case("torch_reference 4 bits", folders[4], here, ("--backend", "torch", "--new_tokens", "4")),
    ]
    if args.small:
        rows.append(Case(f"{args.small.name}, bfloat16", args.small, here))
        rows.append(Case(f"{args.small.name}, native 4 bits", quantised(args.small, work, 4), here))
    return [row for row in rows if not args.cases or any(part in row.name for part in args.cases.split(","))]


def measure(case: Case) -> dict[str, Any]:
    """Run one case; a failure is a result too."""
    ours = case.python == Path(sys.executable)
    apart = [] if ours else ["-E"]  # another environment must not see our PYTHONPATH
    words = [str(case.python), *apart, str(CASE), str(case.folder), *case.words]
    row: dict[str, Any] = {"name": case.name}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_SECONDS,
            env=os.environ | (BOUND if ours else {}),
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done after {LONGEST_SECONDS} s"}
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1][:300]}
    file_bytes = sum(f.stat().st_size for f in case.folder.glob("*.safetensors")) or case.folder.stat().st_size
    return row | {"file_bytes": file_bytes} | json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a case."""
    lines = ["| | decode tok/s | prefill tok/s | file MB | loaded MB |", "|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | |")
            continue
        loaded = f"{row['loaded_bytes'] / 1e6:.0f}" if "loaded_bytes" in row else ""
        speeds = f"{row['decode']:.1f} | {row['prefill']:.0f}"
        lines.append(f"| {row['name']} | {speeds} | {row['file_bytes'] / 1e6:.0f} | {loaded} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    found = library()
    kernel = INSTRUCTION_SETS[found.isas[-1]] if isinstance(found, Library) else str(found)
    return {
        "cpu": name or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernel": kernel,
    }


def main() -> None:
    """Measure, print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where quantised folders are made and kept")
    parser.add_argument("--small", type=Path, help="a second model, in bfloat16 and 4 bits alone")
    parser.add_argument("--peer", type=Path, help="Python of an environment with auto-round 0.16.1 and auto-round-lib")
    parser.add_argument("--llama", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--cases", help="parts of the names of the cases to run, by comma")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inference.json"))
    args = parser.parse_args()
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(args.model, args.work, args):
        rows.append(measure(case))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        record = {"model": args.model.name, "machine": machine(), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
