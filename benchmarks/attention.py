"""Attention of a tuning step, forward and backward: torch's, ours in blocks and, where it was compiled, in tiles.

    python -m benchmarks.attention [--out FILE]

Causal, float32, heads that share keys; the three take turns, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.inference import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from auto_round.calibrate.attention import _Attention
from auto_round.calibrate.tiled import TiledAttention, compiled_attention
from auto_round.runtime.compiled import PATHS

SHAPES = ((4, 9, 3, 512, 64), (2, 32, 8, 512, 64), (2, 14, 2, 1024, 64), (4, 4, 1, 512, 256), (1, 32, 8, 2048, 128))
ROUNDS = 11


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of ROUNDS rounds through all `calls`, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: round(statistics.median(found[1:]), 1) for name, found in times.items()}


def forward_backward(attention: Callable[..., Tensor], given: list[Tensor], grad: Tensor) -> None:
    """One step's worth."""
    torch.autograd.grad(attention(*given), given, grad)


def measured(batch: int, heads: int, key_heads: int, tokens: int, width: int) -> dict[str, float]:
    """Milliseconds by kind, for tensors that lie in memory by tokens as models have them."""
    torch.manual_seed(0)
    shapes = [(batch, tokens, count, width) for count in (heads, key_heads, key_heads)]
    given = [torch.randn(shape).transpose(1, 2).requires_grad_(True) for shape in shapes]
    grad, scale, found = torch.randn(batch, heads, tokens, width), width**-0.5, compiled_attention()
    kinds: dict[str, Callable[..., Tensor]] = {
        "torch": partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True),
        "blocks": lambda q, k, v: _Attention.apply(q, k, v, None, True, scale),
    }
    if found is not None:
        kinds[f"tiles, {PATHS[found.paths - 1]}"] = lambda q, k, v: TiledAttention.apply(q, k, v, None, True, scale)
    return milliseconds({name: partial(forward_backward, kind, given, grad) for name, kind in kinds.items()})


def main() -> None:
    """Measure all shapes; print a table and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows.append({"batch, heads, key heads, tokens, width": shape, "milliseconds": measured(*shape)})
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "float32": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
