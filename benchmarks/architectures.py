"""Put a tiny random model of every architecture in transformers through the whole road, and keep a table of results.

    python benchmarks/architectures.py --results benchmarks/results/architectures.json [--only llama mixtral]

Each model is quantised (W8G32, 1 step of each block and 1 of all scales, a few tokens), saved, opened with plain
transformers and compared with the original whose weights were replaced by the dequantised codes. Results, one for each
architecture:

    pass        same logits (relative difference below 1e-3), and close to the unquantised model's
    wrong       other logits: the only kind that a user would not notice
    refused     an error of ours that names the reason
    failed      any other error, a crash, or no answer in time
    not built   transformers cannot build or run the tiny random model itself; not counted
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from auto_round import AutoRound
from auto_round.errors import AutoRoundError
from auto_round.load import fused_of
from tiny_models import AUTO, architectures, tiny_model

SECONDS = 180  # for one architecture
TOKENS = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
SAME, CLOSE = 1e-3, 0.35


def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits of the test tokens, (4, 24, vocabulary) float32; the random generator is reset for models that draw."""
    torch.manual_seed(0)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits.float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root of the mean squared difference over that of `b`."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@torch.no_grad()
def dequantise_into(model: nn.Module, result: Any) -> None:
    """Replace the weights of a plain model by the dequantised codes, by the layers' names in the model."""
    slices = {name: view for item in fused_of(model) for name, view in item.slices.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in result.plan.quantised:
        weight = result.tensor(name).dequantize()
        if name in slices:
            slices[name].of(parameters[slices[name].parameter]).copy_(weight)
        else:
            parameters[f"{name}.weight"].copy_(weight)


def judge(name: str, task: str, folder: Path) -> dict[str, Any]:
    """Take one architecture through the road; `folder` is empty."""
    try:
        tiny_model(name, task).save_pretrained(folder / "plain")
        model = AUTO[task].from_pretrained(folder / "plain", dtype=torch.float32).eval()
        before = logits_of(model)
        if not bool(torch.isfinite(before).all()):
            return {"result": "not built", "reason": "the random model's logits are not finite"}
    except Exception as error:  # noqa: BLE001  the library's own trouble with a shrunken config, whatever it is
        return {"result": "not built", "reason": _reason(error)}
    try:
        tuner = AutoRound(
            folder / "plain",
            bits=8,
            group_size=32,
            iters=1,
            finish_iters=1,
            nsamples=4,
            batch_size=2,
            seqlen=24,
            dataset=TOKENS,
            device="cpu",
            compute_dtype="float32",
        )
        result = tuner.quantize()
        tuner.save_quantized(folder / "out")
        loaded = AUTO[task].from_pretrained(folder / "out", dtype=torch.float32, device_map="cpu").eval()
        after = logits_of(loaded)
    except AutoRoundError as error:
        return {"result": "refused", "reason": _reason(error)}
    except Exception as error:  # noqa: BLE001  a fault is a row of the table
        return {"result": "failed", "reason": _reason(error)}
    dequantise_into(model, result)
    expected = logits_of(model)
    row = {
        "layers": len(result.plan.quantised),
        "kept": len(result.plan.kept),
        "difference": relative(after, expected),
        "quantisation_error": relative(expected, before),
    }
    good = row["difference"] < SAME and row["quantisation_error"] < CLOSE
    return {"result": "pass" if good else "wrong", **row}


def _reason(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch/nn" not in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:240] if str(error).strip() else ''} ({place})"


def in_a_fork(work: Callable[[], dict[str, Any]], *, verbose: bool) -> dict[str, Any]:
    """Run `work` in a forked child that may crash or hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        if not verbose:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return dict(json.loads(answer))
    number = status & 0x7F
    reason = f"no answer in {SECONDS} s" if number == signal.SIGALRM else f"the process ended with status {status}"
    return {"result": "failed", "reason": reason}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as markdown."""
    counts = Counter(row["result"] for row in rows)
    built = len(rows) - counts["not built"]
    lines = [
        f"transformers {transformers.__version__}: {counts['pass']} of {built} architectures pass"
        f" ({counts['pass'] / max(built, 1):.0%}); {counts['wrong']} wrong, {counts['refused']} refused,"
        f" {counts['failed']} failed; {counts['not built']} more cannot be built tiny.",
        "",
        "| architecture | task | result | layers | kept | difference | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["result"], r["architecture"])):
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        reason = row.get("reason", "").replace("|", "\\|")
        lines.append(
            f"| {row['architecture']} | {row['task']} | {row['result']} | {row.get('layers', '')} | "
            f"{row.get('kept', '')} | {difference} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweep and write the table as JSON and, beside it, markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="JSON file to write; results of other architectures in it stay")
    parser.add_argument("--only", nargs="*", default=[], help="model types; all when left out")
    parser.add_argument("--verbose", action="store_true", help="show what the models print")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = {}
    if options.results and options.results.is_file():
        rows = {(r["architecture"], r["task"]): r for r in json.loads(options.results.read_text())["rows"]}
    for name, task in architectures():
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            row = in_a_fork(lambda name=name, task=task, f=folder: judge(name, task, Path(f)), verbose=options.verbose)
        rows[name, task] = {"architecture": name, "task": task, **row}
        print(f"{name} {task}: {row} in {time.perf_counter() - begin:.0f} s", flush=True)
        if options.results:
            record = {"transformers": transformers.__version__, "rows": list(rows.values())}
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(record, indent=1) + "\n")
            options.results.with_suffix(".md").write_text(table(list(rows.values())))
    print(table(list(rows.values())).splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
