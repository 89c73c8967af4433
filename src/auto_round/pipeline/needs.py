"""What a run needs: memory by stage, samples per forward, and where activations lie; all from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from auto_round.calibrate.dataset import sampled_count
from auto_round.calibrate.divergence import AT_ONCE
from auto_round.calibrate.selftext import PIECE, STRETCHES, at_a_time
from auto_round.errors import SpecError
from auto_round.numerics.compensate import ROWS
from auto_round.pipeline.job import Job, Prepared
from auto_round.runtime.device import free_device_bytes
from auto_round.runtime.events import Listener
from auto_round.runtime.memory import available_bytes, resident_bytes
from auto_round.source.checkpoint import DTYPES
from auto_round.source.quirks import quirk
from auto_round.spec.fusions import EXPERT
from auto_round.tune.alone import ELEMENTS
from auto_round.tune.block import MOTION_BYTES, STATE_BYTES
from auto_round.tune.scales import learned_count

# The three below fit what was measured on SmolLM2-135M and an 8B Llama (docs/safety.md has the figures).
# Resident memory a process reaches over what it has when it plans: the linear algebra library's buffers, the slack of
# the allocator.
OVERHEAD = 60_000_000
# float32 tensors of the size of one slice of a weight that are alive at once while it is rounded alone.
ALONE_COPIES = 10
# float32 tensors of the size of a weight while its compensated start is made: itself, in order, its codes, shifted.
START_COPIES = 4
IN_PLACE = "or give text in the place of what the model is to write (dataset, self_nsamples)"
SAMPLING_COPIES = 5  # float32 tensors of one place's logits while a token is drawn
LOGIT_COPIES = 5  # float32 tensors of the logits at hand: both models', their logarithms, the difference
SCALE_BYTES = 20  # of each group while scales learn: multiplier, gradient, two moments, the best so far
# How configs call the number of experts that see a token.
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
LINEAR_COPIES = 2  # inputs and outputs of Linears in a backward pass: what was saved, and its gradient
HIDDEN_COPIES = 10  # float32 hidden states that a block's norms and sums keep for its backward pass


@dataclass(frozen=True)
class Shared:
    """Linears of a block that read the same tensor: its inputs per token, and the weights of each."""

    inputs: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Counts of one block.

    parameters: of everything; multiplied: those that one token meets, of experts only as many as are chosen for it.
    stored_bytes: of its Linears' weights in the checkpoint. features: inputs and outputs of the Linears that one token
    meets. shared: its quantised Linears, those with most inputs first.
    """

    parameters: int
    multiplied: int
    stored_bytes: int
    features: int
    shared: tuple[Shared, ...]

    @property
    def weights(self) -> int:
        """Weights of all quantised Linears."""
        return sum(sum(linears.weights) for linears in self.shared)

    @property
    def largest_weight(self) -> int:
        """Weights of the largest quantised Linear."""
        return max((max(linears.weights) for linears in self.shared), default=0)


@dataclass(frozen=True)
class Needs:
    """What a run will use. memory: stage -> peak bytes of the host; see the fields of the same names in `Forecast`.

    on_host: activations are in the host's memory though an accelerator computes. activation_bytes: most that there are
    at once, wherever they lie. device_bytes: peak on the accelerator that computes, None when there is none.
    """

    memory: Mapping[str, int]
    samples_per_forward: int
    on_disk: bool
    on_host: bool
    activation_bytes: int
    device_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """Largest of all stages."""
        return max(self.memory.values())


def needs(prepared: Prepared, samples: int, seqlen: int) -> Needs:
    """Choose where activations lie and how many samples go through a block at once, so that the budget suffices.

    First activations leave an accelerator for the host, and the host for the disk, then fewer samples go through a
    block at once, where that helps. samples, seqlen: of the calibration set; 0 samples when none is needed. The result
    may still be above the budget: see `too_much` and `device_shortage`.
    """
    job, budget, blocks = prepared.job, budget_bytes(prepared.job), all_sizes(prepared)
    on_disk, on_host, micro = job.activations_on_disk, job.recipe.low_gpu_mem_usage, job.recipe.batch_size
    found = _needs(prepared, blocks, samples, seqlen, micro, on_disk=on_disk, on_host=on_host)
    if samples and device_shortage(found, job):
        on_host = True
        found = _needs(prepared, blocks, samples, seqlen, micro, on_disk=on_disk, on_host=on_host)
    if samples and found.peak_bytes > budget:
        on_disk = True
        found = _needs(prepared, blocks, samples, seqlen, micro, on_disk=on_disk, on_host=on_host)
    least = _needs(prepared, blocks, samples, seqlen, 1, on_disk=on_disk, on_host=on_host)
    fits = not device_shortage(least, job)  # else a device that really runs out lowers it, see `Runner`
    while samples and micro > 1 and (found.peak_bytes > budget or (fits and device_shortage(found, job))):
        micro = fewer(micro)
        found = _needs(prepared, blocks, samples, seqlen, micro, on_disk=on_disk, on_host=on_host)
    return found


def device_shortage(wanted: Needs, job: Job) -> str | None:
    """A sentence when a run needs more memory than the accelerator has left, else None."""
    free = free_device_bytes(job.device)
    if wanted.device_bytes is None or free is None or wanted.device_bytes <= free:
        return None
    return f"{job.device} needs about {wanted.device_bytes / 1e9:.2f} GB of memory and has {free / 1e9:.2f} GB left"


def too_much(wanted: Needs, job: Job) -> str | None:
    """A sentence when a run needs more than its budget, else None."""
    stage = max(wanted.memory, key=lambda name: wanted.memory[name])
    remedy = "lower seqlen, or choose the recipe rtn (auto-round-rtn), which needs no activations"
    return shortage(stage, wanted.peak_bytes, job, remedy)


def shortage(stage: str, needed: int, job: Job, remedy: str) -> str | None:
    """A sentence when a stage needs more bytes than the job's budget, else None."""
    budget = budget_bytes(job)
    if needed <= budget:
        return None
    limit = "max_memory allows" if job.max_memory else "this machine has"
    return (
        f"{stage} needs about {needed / 1e9:.2f} GB of memory and {limit} {budget / 1e9:.2f} GB; allow more, {remedy}"
    )


def heed(sentence: str | None, job: Job, listener: Listener) -> None:
    """Raise SpecError with a `shortage` of what was allowed; warn of one of what the machine has."""
    if sentence and job.max_memory:
        raise SpecError(sentence)
    if sentence:
        listener.warn(sentence)


def own_texts(job: Job, seqlen: int) -> list[tuple[int, int, int]]:
    """(texts, tokens written of each, tokens of each) that the model is to write itself, by what they begin with.

    seqlen: tokens of a sample.
    """
    found = []
    if sampled := sampled_count(job.dataset, job.recipe.given_samples):
        found.append((sampled, seqlen, seqlen))
    if own := job.recipe.self_nsamples:
        stretch = math.ceil(seqlen / STRETCHES)
        found.append((own * STRETCHES, math.ceil((1 - PIECE) * stretch), stretch))
    return found


def writing_bytes(prepared: Prepared, texts: int, length: int) -> tuple[int, int]:
    """Peak memory of (the host, the accelerator, 0 when there is none) while the original writes `texts` of `length`
    tokens: the whole model; beside it first the files that are cast, then keys and values of those written together and
    their logits.
    """
    model, width = prepared.skeleton.model, prepared.job.dtype.itemsize
    embedding = model.get_input_embeddings().weight
    vocabulary: int
    hidden: int
    vocabulary, hidden = embedding.shape
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # an architecture may have no attention
    kept = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or hidden // heads
    )
    rows = min(texts, at_a_time(length))
    weights: int = sum(p.numel() for p in model.parameters()) * width
    entries = prepared.skeleton.checkpoint.entries.values()
    cast = sum(entry.nbytes for entry in entries if DTYPES.get(entry.dtype) != prepared.job.dtype)
    working = 2 * len(prepared.blocks) * kept * width * rows * length + SAMPLING_COPIES * 4 * rows * vocabulary
    host = resident_bytes() + OVERHEAD + weights
    return (host + max(cast, working), 0) if prepared.job.device.type == "cpu" else (host + cast, weights + working)


def checking_bytes(prepared: Prepared, positions: int) -> int:
    """Peak memory of running the original and the result block by block on a few samples of `positions` tokens in all.

    The head and the rest outside the blocks are there at once, the stored bytes of one of them beside them, and the
    logits of both chains twice.
    """
    outside, head = outside_bytes(prepared, prepared.job.dtype)
    vocabulary: int = prepared.skeleton.model.get_input_embeddings().weight.shape[0]
    copied = max((entry.nbytes for entry in prepared.source.checkpoint.entries.values()), default=0)
    width = prepared.job.dtype.itemsize
    block = max(sizes.parameters for sizes in all_sizes(prepared)) * width
    behind = outside + head + copied + 4 * positions * vocabulary * width
    return resident_bytes() + OVERHEAD + max(behind, outside, block)


def opening_bytes(prepared: Prepared, positions: int) -> int:
    """Peak memory of opening the result through transformers, beside the original's logits: as much as in floats, since
    a backend may unpack all weights."""
    model = prepared.skeleton.model
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    weights: int = sum(p.numel() for p in model.parameters()) * prepared.job.dtype.itemsize
    return resident_bytes() + OVERHEAD + weights + 3 * positions * vocabulary * prepared.job.dtype.itemsize


def fewer(samples: int) -> int:
    """The largest number below `samples` that divides it, so that steps stay of one size."""
    return next(count for count in range(samples // 2, 0, -1) if samples % count == 0)


def budget_bytes(job: Job) -> int:
    """Resident memory this run may reach: what was asked for, or what the machine has."""
    return job.max_memory or resident_bytes() + available_bytes()


def micro_batched(job: Job, samples: int) -> Job:
    """The same job with `samples` in one forward and as many in one step as before: gradients add up over them."""
    recipe = job.recipe
    parts = recipe.batch_size // samples
    changed = replace(recipe, batch_size=samples, gradient_accumulate_steps=recipe.gradient_accumulate_steps * parts)
    return replace(job, recipe=changed)


def outside_bytes(prepared: Prepared, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes in `dtype` of what lies outside the blocks: (without the head, the head alone)."""
    model = prepared.skeleton.model
    head = model.get_output_embeddings()
    inside = tuple(f"{block}." for block in prepared.blocks)
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)}
    heads = sum(p.numel() for p in head.parameters()) if head is not None else 0
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return sum(p.numel() for n, p in own.items() if n not in names) * dtype.itemsize, heads * dtype.itemsize


def _needs(
    prepared: Prepared, blocks: Sequence[Sizes], samples: int, seqlen: int, micro: int, *, on_disk: bool, on_host: bool
) -> Needs:
    job, base = prepared.job, resident_bytes() + OVERHEAD
    width = job.dtype.itemsize
    hidden: int = prepared.skeleton.model.get_input_embeddings().weight.shape[1]
    outside, _ = outside_bytes(prepared, job.dtype)
    activations = samples * seqlen * _kept_per_token(prepared, hidden) * width
    finished = activations * job.recipe.samples // samples if samples and job.recipe.finish_iters else 0
    copied = max((entry.nbytes for entry in prepared.source.checkpoint.entries.values()), default=0)
    largest = max((sizes.largest_weight for sizes in blocks), default=0)
    sliced = ALONE_COPIES * 4 * min(ELEMENTS, largest)
    memory, there = {"saving": base + copied + 4 * largest}, job.device.type != "cpu"
    if samples:
        tuning = max(_tuning(sizes, job, micro * seqlen, hidden) for sizes in blocks)
        if prepared.last_by_tokens:
            tuning = max(tuning, _tuning(blocks[-1], job, micro * seqlen, hidden) + _judging(prepared, micro * seqlen))
        stored = max(sizes.stored_bytes for sizes in blocks)
        kept_here = activations if not on_disk and (on_host or not there) else 0
        kept_there = activations if not on_disk and not kept_here else 0
        memory["loading"] = base + copied + kept_here + (0 if there else outside)
        memory["tuning"] = base + kept_here + stored + (0 if there else tuning)
        finishing = _finishing(prepared, blocks, micro, seqlen) if job.recipe.finish_iters else 0
        if finishing:
            kept_here, kept_there = (finished if kept else 0 for kept in (kept_here, kept_there))
            memory["finishing"] = base + kept_here + copied + (0 if there else finishing)
        device = max(outside, tuning, finishing) + kept_there
    else:
        rounding = max((2 * sizes.weights for sizes in blocks), default=0) + 2 * largest * 4
        memory["rounding"] = base + rounding + (0 if there else sliced)
        device = sliced
    host = there and on_host and not on_disk
    return Needs(memory, micro, on_disk, host, max(activations, finished), device if there else None)


def _kept_per_token(prepared: Prepared, hidden: int) -> int:
    """Values kept of each token: the hidden states of both chains, and what Gemma 3n and 4 hand each block besides."""
    config = prepared.skeleton.model.config.get_text_config()
    streams = getattr(config, "altup_num_inputs", None) or 1
    beside = getattr(config, "hidden_size_per_layer_input", None) or 0
    return 2 * streams * hidden + beside * len(prepared.blocks)


def _tuning(sizes: Sizes, job: Job, tokens: int, hidden: int) -> int:
    """Peak bytes of tuning one block where it is computed: the block itself, and what tuning adds.

    tokens: in one forward of a step. hidden: width of the hidden states.
    """
    width = job.dtype.itemsize
    block = sizes.parameters * width
    moving = MOTION_BYTES if job.recipe.iters else 0
    state, codes = (STATE_BYTES + moving) * sizes.weights, sizes.weights  # the best codes so far, a byte each
    steps = state + codes + max(sizes.weights * width + tokens * _per_token(sizes, width, hidden), codes)
    return block + max(steps, _starting(sizes) if job.recipe.start == "compensated" else 0)


def _finishing(prepared: Prepared, blocks: Sequence[Sizes], micro: int, seqlen: int) -> int:
    """Peak bytes of learning all scales together: all that lies outside the blocks, one block with its gradients, what
    enters each block, the scales' state, and the logits of a part of the tokens."""
    width = prepared.job.dtype.itemsize
    hidden: int = prepared.skeleton.model.get_input_embeddings().weight.shape[1]
    groups = sum(
        layer.out_features * learned_count(layer.scheme, layer.in_features)
        for layer in prepared.plan.quantised.values()
        if layer.scheme is not None
    )
    tokens = micro * seqlen
    largest = max(
        sizes.parameters * width + sizes.weights * width + tokens * _per_token(sizes, width, hidden) for sizes in blocks
    )
    states = (len(blocks) + 1) * tokens * hidden * width
    outside, logits = sum(outside_bytes(prepared, prepared.job.dtype)), _logit_bytes(prepared, tokens)
    return outside + SCALE_BYTES * groups + states + max(largest, logits)


def _judging(prepared: Prepared, tokens: int) -> int:
    """Peak bytes of what `TokenLoss` needs: all that lies outside the blocks, logits of a part of the tokens."""
    return sum(outside_bytes(prepared, prepared.job.dtype)) + _logit_bytes(prepared, tokens)


def _logit_bytes(prepared: Prepared, tokens: int) -> int:
    vocabulary: int = prepared.skeleton.model.get_input_embeddings().weight.shape[0]
    return LOGIT_COPIES * 4 * min(AT_ONCE, tokens) * vocabulary


def _per_token(sizes: Sizes, width: int, hidden: int) -> int:
    """Bytes that a backward pass keeps of one token."""
    return LINEAR_COPIES * sizes.features * width + HIDDEN_COPIES * hidden * 4


def _starting(sizes: Sizes) -> int:
    """Peak bytes of the compensated start beside its block: moments go as layers come.

    Moments that would take more than the layers' state are gathered in lots (see `tune_block`).
    """
    layers, peak = 0, 0
    for lot in _lots(sizes.shared, STATE_BYTES * sizes.weights):
        moments = sum(4 * shared.inputs**2 for shared in lot)
        for shared in lot:
            factor = 4 * shared.inputs**2
            peak = max(peak, layers + moments + factor + 8 * ROWS * shared.inputs)
            moments -= factor
            for weights in shared.weights:
                peak = max(peak, layers + moments + factor + 4 * START_COPIES * weights)
                layers += STATE_BYTES * weights
    return peak


def _lots(all_shared: Sequence[Shared], room: int) -> list[list[Shared]]:
    """Cut into lots whose moments fit into `room` bytes, at least one each."""
    lots: list[list[Shared]] = []
    held = 0
    for shared in all_shared:
        moment = 4 * shared.inputs**2
        if not lots or held + moment > room:
            lots.append([])
            held = 0
        lots[-1].append(shared)
        held += moment
    return lots


def all_sizes(prepared: Prepared) -> list[Sizes]:
    """Counts of every block."""
    return [_count(prepared, block) for block in prepared.blocks]


def _count(prepared: Prepared, block: str) -> Sizes:
    module = prepared.skeleton.model.get_submodule(block)
    linears = {f"{block}.{name}": m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    # q, k, v and gate, up read the same tensor; Linears with as many inputs in the same parent are taken to share.
    sharing: dict[tuple[str, int], list[int]] = {}
    for name, linear in linears.items():
        if name in prepared.plan.quantised:
            sharing.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear.weight.numel())
    shared = [Shared(inputs, tuple(weights)) for (_, inputs), weights in sharing.items()]
    entries = prepared.source.checkpoint.entries
    stored = [entries[prepared.stored_names[name]] for name in linears if name in prepared.stored_names]
    met = _shares(prepared, linears)
    parameters = sum(p.numel() for p in module.parameters())
    return Sizes(
        parameters=parameters,
        multiplied=parameters - round(sum((1 - met[name]) * m.weight.numel() for name, m in linears.items())),
        stored_bytes=sum(entry.nbytes for entry in stored if entry.dtype in DTYPES),
        features=math.ceil(sum(met[name] * (m.in_features + m.out_features) for name, m in linears.items())),
        shared=tuple(sorted(shared, key=lambda linears: -linears.inputs)),
    )


def _shares(prepared: Prepared, linears: Collection[str]) -> dict[str, float]:
    """The share of tokens that come to each Linear: to an expert, as many as are chosen for a token over all."""
    model = prepared.skeleton.model
    config = model.config.get_text_config()
    chosen = next((n for key in EXPERTS_CHOSEN if isinstance(n := getattr(config, key, None), int)), None)
    experts = {name: found for name in linears if (found := EXPERT.match(name))}
    counts = Counter(owner for owner, _ in {(found[1], found[0]) for found in experts.values()})
    all_run = quirk("classes", "run_all_experts")
    shares = {
        owner: 1.0 if chosen is None or type(model.get_submodule(owner)).__name__ in all_run else min(1.0, chosen / n)
        for owner, n in counts.items()
    }
    return {name: shares[experts[name][1]] if name in experts else 1.0 for name in linears}
