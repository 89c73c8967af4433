"""How fast this machine is at what a run does: the tuner itself, tried for a moment on blocks of random weights."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from auto_round.numerics.bitpack import pack, unpack
from auto_round.numerics.kpack import pack_blocks
from auto_round.pipeline.job import Job
from auto_round.qtensor import BlockTensor
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.spec.scheme import Scheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.block import Activations, BlockTask, tune_block

NARROW, WIDE = 256, 512  # inputs and outputs of the Linears that are tried
FEW, MANY = 16, 1024  # tokens
STEPS = 3
DISK_BYTES = 32_000_000


@dataclass(frozen=True)
class Rates:
    """Seconds for one of each.

    forward: one multiplication and addition of a forward pass; step: the same of a step (three passes). sweep: one
    weight in a step, whatever the tokens. searched: one weight of the start; compensated: one unit of out * in^2 + in^3
    of it. rounded: one weight rounded alone. packed: one weight encoded and read back twice. written, read: one byte
    of a file.
    """

    forward: float
    step: float
    sweep: float
    searched: float
    compensated: float
    rounded: float
    packed: float
    written: float
    read: float


def measure(job: Job, scheme: Scheme, folder: Path) -> Rates:
    """Try everything once, in a second or a few. folder: where the run will write."""
    start_narrow, start_wide = (_tuning(job, scheme, width, FEW, 0) for width in (NARROW, WIDE))
    few, many = (
        (_tuning(job, scheme, WIDE, tokens, STEPS) - _tuning(job, scheme, WIDE, tokens, 0)) / STEPS
        for tokens in (FEW, MANY)
    )
    weights = 2 * WIDE * WIDE
    step = max((many - few) / (weights * (MANY - FEW)), 1e-13)
    sweep = max(few / weights - FEW * step, 0.0)
    searched, compensated = _split(start_narrow, start_wide)
    written, read = _disk(folder)
    rounded, packed = _alone(job, scheme, folder)
    return Rates(_forward(job), step, sweep, searched, compensated, rounded, packed, written, read)


def _split(narrow: float, wide: float) -> tuple[float, float]:
    """Time of the start at two widths -> (by weight, by out * in^2 + in^3): two equations with two unknowns."""
    w1, w2 = 2 * NARROW**2, 2 * WIDE**2
    c1, c2 = 4 * NARROW**3, 4 * WIDE**3
    compensated = max((wide - narrow * w2 / w1) / (c2 - c1 * w2 / w1), 0.0)
    return max((narrow - compensated * c1) / w1, 0.0), compensated


def _tuning(job: Job, scheme: Scheme, width: int, tokens: int, iters: int) -> float:
    """Seconds of `iters` steps, and the start, on a block of two Linears (width x width) and one sample of `tokens`."""
    draw = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(width, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))
    block.to(job.device, job.dtype).requires_grad_(False)
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    weights = {name: torch.randn(width, width, generator=draw).mul_(0.02) for name in linears}
    inputs = torch.randn(1, tokens, width, generator=draw).to(job.device, job.dtype)
    task = BlockTask(lambda hidden, _: block(hidden), linears, weights, dict.fromkeys(linears, scheme))
    with torch.no_grad():
        targets = block(inputs)
    recipe = replace(job.recipe, iters=iters, batch_size=1, gradient_accumulate_steps=1, enable_torch_compile=False)

    def once() -> None:
        generator = generator_for(0, "timing")
        tune_block(task, Activations(inputs, targets, None), recipe, generator, job.device, lambda *_: None)

    return _seconds(once)


def _forward(job: Job) -> float:
    linear = nn.Linear(WIDE, WIDE, bias=False).to(job.device, job.dtype)
    inputs = torch.ones(MANY, WIDE, device=job.device, dtype=job.dtype)
    with torch.no_grad():
        return _seconds(lambda: linear(inputs)) / (MANY * WIDE * WIDE)


def _alone(job: Job, scheme: Scheme, folder: Path) -> tuple[float, float]:
    weight = torch.randn(WIDE, 4 * WIDE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    count = weight.numel()
    rounded = _seconds(lambda: quantise_alone(weight, scheme, "plain", None, job.device)) / count
    tensor = quantise_alone(weight, scheme, "plain", None, job.device)
    with tempfile.TemporaryDirectory(prefix=".timing-", dir=folder) as scratch:
        journal = Journal(Path(scratch))
        journal.put("timing", {"x": tensor})

        def there_and_back() -> None:
            """What a layer goes through after it is rounded: packed, read, packed again, read twice to be compared."""
            for _ in range(2):
                _pack_and_unpack(journal)

        packed = _seconds(there_and_back) / count
    return rounded, packed


def _pack_and_unpack(journal: Journal) -> Tensor:
    tensor = journal.get("x")
    if isinstance(tensor, BlockTensor):
        return pack_blocks(tensor.fields(), tensor.scheme)
    return unpack(pack(tensor.codes, tensor.scheme.bits), tensor.scheme.bits, tensor.in_features)


def _disk(folder: Path) -> tuple[float, float]:
    """Seconds per byte of writing durably and of reading back (from the page cache at best, as a fresh file is)."""
    data = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    with tempfile.NamedTemporaryFile(prefix=".timing-", dir=folder) as file:
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        begin = time.perf_counter()
        Path(file.name).read_bytes()
        return written / len(data), (time.perf_counter() - begin) / len(data)


def _seconds(work: Callable[[], object], repeats: int = 2) -> float:
    """Shortest of a few tries: what is in the way of one is not in the way of all."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
