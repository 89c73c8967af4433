"""How fast this machine is at what a run does: its own parts, each tried for a moment on random values."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from auto_round.calibrate.attention import BlockedAttention
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.numerics.compensate import compensation
from auto_round.pipeline.inspection import examine
from auto_round.pipeline.job import Job
from auto_round.qtensor import BlockTensor, QuantTensor
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.source.checkpoint import TensorEntry
from auto_round.spec.scheme import Scheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.block import CHECKPOINTS, Activations, BlockTask, tune_block
from auto_round.tune.moments import Moment
from auto_round.tune.start import Inputs, inputs_from
from auto_round.tune.starting import start_layer

WIDTH = 1024  # inputs of what is tried: then a weight and what belongs to it lie in no cache, as in a run
FEW, MANY = 16, 256  # tokens
STEPS = 4
HEAD = 64
ATTENTION_SHARE = 0.75  # of all pairs of tokens: causal attention needs half, kernels do more
ROWS, TALL = 512, 4096  # rows of a weight that is started, and of one that is rounded and packed
DISK_BYTES = 64_000_000
PIECES = 8  # places of the source that are read


@dataclass(frozen=True)
class Rates:
    """Seconds for one of each.

    forward: one multiplication and addition of a forward pass, of which a step takes three. around: what a forward pass
    does besides (norms, activations, heads), for one input or output of a Linear and one token; around_step: the same
    of a step. sweep: one weight in a step, whatever the tokens; lone: one weight in the forward pass of one token.
    examined, searched, ordered, rounded: one weight looked at for NaN, started by range search, given codes column by
    column (without the products of whole matrices, which go at `forward`), rounded alone. factored: one value of in^3
    of an input's moment.
    kept: one weight packed, hashed and written to the journal. restored: one weight read from there as floats. packed:
    one weight taken from the journal, encoded, decoded and compared with the journal's. written, read: one byte of a
    file made durable, and of a file just written. source: one byte of the original model.
    """

    forward: float
    around: float
    around_step: float
    sweep: float
    lone: float
    examined: float
    searched: float
    ordered: float
    factored: float
    rounded: float
    kept: float
    restored: float
    packed: float
    written: float
    read: float
    source: float


def measure(job: Job, scheme: Scheme, folder: Path, source: Iterable[TensorEntry]) -> Rates:
    """Try everything once, in a second or a few. folder: where the run will write; source: tensors it will read."""
    forward, lone = _forward(job, MANY), _forward(job, 1)
    around, around_step, sweep = _trial(job, scheme, forward)
    written, read = _disk(folder)
    searched, ordered, factored = _start(job, scheme, forward)
    weight = _weight(TALL).to(torch.bfloat16)
    count = weight.numel()
    examined = _seconds(job, lambda: examine("x", weight, scheme)) / count
    rounded = _seconds(job, lambda: quantise_alone(weight, scheme, "plain", None, job.device)) / count
    tensor = quantise_alone(weight, scheme, "plain", None, job.device)
    with tempfile.TemporaryDirectory(prefix=".timing-", dir=folder) as scratch:
        journal = Journal(Path(scratch))
        kept = _seconds(job, lambda: journal.put("timing", {"x": tensor}), 1) / count
        restored = _seconds(job, lambda: journal.get("x").dequantize()) / count
        packed = _seconds(job, lambda: _there_and_back(journal), 1) / count
    return Rates(
        forward=forward,
        around=around,
        around_step=around_step,
        sweep=sweep,
        lone=lone,
        examined=examined,
        searched=searched,
        ordered=ordered,
        factored=factored,
        rounded=rounded,
        kept=kept,
        restored=restored,
        packed=packed,
        written=written,
        read=read,
        source=_source(list(source)),
    )


def _weight(rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def _forward(job: Job, tokens: int) -> float:
    linear = nn.Linear(WIDTH, TALL, bias=False).to(job.device, job.dtype)
    inputs = torch.ones(tokens, WIDTH, device=job.device, dtype=job.dtype)
    with torch.no_grad():
        return _seconds(job, lambda: linear(inputs)) / (tokens * WIDTH * TALL)


class _Block(nn.Module):
    """What the blocks of most models are made of: (1, tokens, WIDTH) to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self._norm(hidden)
        q, k, v = (part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (part * 0.6 + torch.cat([-part[..., HEAD // 2 :], part[..., : HEAD // 2]], -1) * 0.8 for part in (q, k))
        with BlockedAttention():
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.o(attended.transpose(1, 2).flatten(2))
        x = self._norm(hidden)
        output: Tensor = hidden + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return output

    @staticmethod
    def _norm(hidden: Tensor) -> Tensor:
        x = hidden.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


def _trial(job: Job, scheme: Scheme, forward: float) -> tuple[float, float, float]:
    """Seconds of (what is around the products of a forward pass, of a step, the sweep); see `Rates`."""
    block = _Block().to(job.device, job.dtype).requires_grad_(False)
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    weights, features = len(linears) * WIDTH**2, len(linears) * 2 * WIDTH
    (fast, few), (slow, many) = (_passes(job, scheme, block, linears, tokens) for tokens in (FEW, MANY))
    products = forward * (weights + ATTENTION_SHARE * 2 * MANY * WIDTH)
    around = max((slow - fast) / (MANY - FEW) - products, 0.0) / features
    token = (many - few) / (MANY - FEW)
    around_step = max(token - 3 * products, around * features) / features
    return around, around_step, max(few - FEW * token, 0.0) / weights


def _passes(
    job: Job, scheme: Scheme, block: nn.Module, linears: dict[str, nn.Linear], tokens: int
) -> tuple[float, float]:
    """Seconds of one forward pass and of one step of a block on one sample of `tokens`.

    What goes before the steps, and the trials of the codes between them, are taken off.
    """
    inputs = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(job.device, job.dtype)
    weights = {name: _weight(WIDTH) for name in linears}
    task = BlockTask(lambda hidden, _: block(hidden), linears, weights, dict.fromkeys(linears, scheme))
    with torch.no_grad():
        targets = block(inputs)
        once = _seconds(job, lambda: block(inputs))
    recipe = replace(
        job.recipe, iters=STEPS, batch_size=1, gradient_accumulate_steps=1, enable_torch_compile=False, start="plain"
    )

    def tuned(iters: int) -> None:
        data = Activations.of(inputs, targets, None)
        tune_block(task, data, replace(recipe, iters=iters), generator_for(0, "timing"), job.device, lambda *_: None)

    trials = len({round(share * STEPS) for share in CHECKPOINTS}) * once
    taken = _seconds(job, lambda: tuned(STEPS)) - _seconds(job, lambda: tuned(0)) - trials
    return once, max(taken, 0.0) / STEPS


def _start(job: Job, scheme: Scheme, forward: float) -> tuple[float, float, float]:
    """Seconds of (the search, the columns' loop) for one weight, and of a factor for one value of in^3."""
    kind = job.recipe.start
    if kind == "plain":
        return 0.0, 0.0, 0.0
    weight, count = _weight(ROWS).to(job.device), ROWS * WIDTH
    moment = torch.eye(WIDTH, device=job.device)
    known = inputs_from(Moment(moment, WIDTH), kind)
    assert known is not None
    least = Inputs(known.importance, None)
    searched = _seconds(job, lambda: start_layer(weight, scheme, "search", least), 1) / count
    if known.compensation is None:
        return searched, 0.0, 0.0
    whole = _seconds(job, lambda: start_layer(weight, scheme, kind, known), 1) / count
    factored = _seconds(job, lambda: compensation(moment, 1.0)) / WIDTH**3
    return searched, max(whole - searched - forward * WIDTH / 2, 0.0), factored


def _there_and_back(journal: Journal) -> bool:
    """What a layer goes through when it is saved: read, encoded, decoded, and compared with what is read again.

    GPTQ's layout stands for all of codes; blocks of GGUF lie in their file as they are.
    """
    tensor: QuantTensor = journal.get("x")
    if isinstance(tensor, BlockTensor):
        return tensor.same(journal.get("x"))  # type: ignore[arg-type]
    found = GPTQ_RAW.decode(GPTQ_RAW.encode(tensor), tensor.scheme, tensor.in_features)
    return found.same(journal.get("x"))  # type: ignore[arg-type]


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


def _source(entries: list[TensorEntry]) -> float:
    """Seconds per byte of the original model, read here and there: from the disk, or from memory if it is there."""
    chosen = [entries[len(entries) * i // PIECES] for i in range(PIECES)] if entries else []
    read, begin = 0, time.perf_counter()
    for entry in chosen:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            read += len(file.read(min(entry.nbytes, DISK_BYTES // PIECES)))
    return (time.perf_counter() - begin) / max(read, 1)


def _seconds(job: Job, work: Callable[[], object], repeats: int = 2) -> float:
    """Shortest of a few tries: what is in the way of one is not in the way of all."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if job.device.type != "cpu":
            torch.get_device_module(job.device).synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
