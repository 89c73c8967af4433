"""The native kernel alone: all linear layers of a model of Qwen2.5-0.5B's shape, by bits, instruction set and tokens.

    python -m benchmarks.layers [--out FILE]

Every layer has memory of its own, so that weights come from memory and not from a cache, as they do while decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.inference import machine
from torch.nn.functional import linear

from auto_round.inference.kernels.native import (
    INSTRUCTION_SETS,
    Library,
    library,
    native_dense,
    native_linear,
    operator_linear,
)
from auto_round.inference.kernels.tiles import Tiles
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

BLOCKS = 24
SHAPES = ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864))  # (out, in) of a block
HEAD = (151936, 896)
GROUP_SIZE = 128
BITS = (4, 2, 3, 8)
TOKENS = (8, 64, 400)
REPEATS = 5
CALLS = 2000


def seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median of REPEATS rounds through all `calls`, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def packed(out_features: int, in_features: int, bits: int) -> Tiles:
    """A random layer."""
    scheme = Scheme(bits, GROUP_SIZE)
    codes = torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8)
    return Tiles.of(QTensor(codes, torch.rand(out_features, scheme.group_count(in_features)).half(), None, scheme))


def native_row(bits: int, isa: int) -> dict[str, Any]:
    """Milliseconds for all layers at 1 token, with 4 bits at more, and the gigabytes of weights read a second."""
    models = {shape: packed(*shape, bits) for shape in set(SHAPES)}
    layers = [_copy(models[shape]) for _ in range(BLOCKS) for shape in SHAPES]
    row: dict[str, Any] = {"name": f"native {bits} bits, {INSTRUCTION_SETS[isa]}"}
    for tokens in (1, *(TOKENS if bits == BITS[0] else ())):
        inputs = {n: torch.randn(tokens, n, dtype=torch.bfloat16) for _, n in SHAPES}
        calls = [partial(native_linear, inputs[t.in_features], t, None, isa) for t in layers]
        row[f"ms_{tokens}"] = 1e3 * seconds(calls)
    row["gb_s"] = sum(t.codes.nbytes + t.scales.nbytes for t in layers) / row["ms_1"] / 1e6
    return row


def _copy(tiles: Tiles) -> Tiles:
    return Tiles(tiles.codes.clone(), tiles.scales.clone(), None, tiles.scheme, tiles.out_features, tiles.in_features)


def dense_row(dtype: torch.dtype) -> dict[str, Any]:
    """The same for torch's own linear."""
    layers = [torch.randn(shape, dtype=dtype) for _ in range(BLOCKS) for shape in SHAPES]
    row: dict[str, Any] = {"name": f"torch {str(dtype).removeprefix('torch.')}"}
    for tokens in (1, *TOKENS):
        inputs = {n: torch.randn(tokens, n, dtype=dtype) for _, n in SHAPES}
        row[f"ms_{tokens}"] = 1e3 * seconds([partial(linear, inputs[w.shape[1]], w) for w in layers])
    row["gb_s"] = sum(w.nbytes for w in layers) / row["ms_1"] / 1e6
    return row


def head_rows() -> list[dict[str, Any]]:
    """One token through an output head."""
    x = torch.randn(1, HEAD[1], dtype=torch.bfloat16)
    dense, eight = torch.randn(HEAD, dtype=torch.bfloat16), packed(*HEAD, 8)
    work = {
        "head, torch bfloat16": (dense.nbytes, partial(linear, x, dense)),
        "head, native bfloat16": (dense.nbytes, partial(native_dense, x, dense, None)),
        "head, native 8 bits": (eight.codes.nbytes + eight.scales.nbytes, partial(native_linear, x, eight, None)),
    }
    rows = []
    for name, (size, multiply) in work.items():
        spent = seconds([multiply])
        rows.append({"name": name, "ms_1": 1e3 * spent, "gb_s": size / spent / 1e9})
    return rows


def call_rows() -> list[dict[str, Any]]:
    """What a call costs when there is next to nothing to multiply."""
    x, dense, tiles = torch.randn(1, 32), torch.randn(32, 32), packed(32, 32, 4)
    work = {
        "one tiny call, torch float32": partial(linear, x, dense),
        "one tiny call, native": partial(native_linear, x, tiles, None),
        "one tiny call, native as operator": partial(operator_linear, x, tiles, None),
    }
    return [{"name": name, "ms_1": 1e3 * seconds([call] * CALLS) / CALLS} for name, call in work.items()]


def memory_row() -> dict[str, Any]:
    """Reading memory and nothing else, with all threads."""
    buffer = torch.zeros(1 << 26, dtype=torch.int64)
    spent = seconds([buffer.sum])
    return {"name": "sum of a buffer", "ms_1": 1e3 * spent, "gb_s": buffer.nbytes / spent / 1e9}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a row."""
    columns = ("ms_1", "gb_s", *(f"ms_{tokens}" for tokens in TOKENS))
    heads = ("1 token, ms", "GB/s", *(f"{tokens} tokens, ms" for tokens in TOKENS))
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = (f"{row[c]:.3g}" if c in row else "" for c in columns)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    args = parser.parse_args()
    found = library()
    if not isinstance(found, Library):
        raise SystemExit(str(found))
    with torch.inference_mode():
        rows = [memory_row(), *head_rows(), *call_rows()]
        rows += [native_row(bits, isa) for bits in BITS for isa in reversed(found.isas) if isa]
        rows += [dense_row(dtype) for dtype in (torch.bfloat16, torch.float32)]
    args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
