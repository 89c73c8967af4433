"""Tuning one block: a start for every Linear in it, then gradient steps on the loss of the block's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auto_round.errors import AutoRoundError
from auto_round.qtensor import QuantTensor
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.moments import Moments
from auto_round.tune.start import Inputs, inputs_from
from auto_round.tune.starting import Layer, start_layer

# Shares of the steps after which the codes are tried on the held-out samples; the last are the likely winners.
CHECKPOINTS = (0.5, 0.75, 1.0)
LARGEST = 4.0  # a token's size in the loss, in medians of all tokens' sizes
STATE_BYTES = 8  # of each weight while it is tuned: W and V in float32
MOTION_BYTES = 4  # of each weight from the first step on, see `passes.Motion`

# (output, targets, weights, samples, step or None) -> sum over tokens of their weight times what each loses; see
# `square_error`. Where no step is given the block is judged, and nothing is to be drawn.
BlockLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Activations:
    """What a block sees and should give, for all samples.

    inputs, targets: (samples, tokens, hidden), on the device or on the host. mask: (samples, tokens) bool, True where
    a real token is; None when there is no padding. weights: what each token counts in the loss, see `token_weights`.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, mask: Tensor | None) -> Activations:
        """All of them, with the weights that the targets ask for."""
        return cls(inputs, targets, mask, token_weights(targets, mask))

    def pick(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights of the samples `rows`, on `device`."""
        return self.inputs[rows].to(device), self.targets[rows].to(device), self.weights[rows].to(device)

    def masked(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Inputs and mask of the samples `rows`, on `device`."""
        return self.inputs[rows].to(device), None if self.mask is None else self.mask[rows].to(device)


@dataclass(frozen=True)
class TunedBlock:
    """Codes of every Linear of a block by name, and the losses that BlockStats describes.

    unreached: Linears that no calibration token came to (experts), whose start knows their weights alone.
    """

    tensors: dict[str, QuantTensor]
    loss_plain: float
    loss_start: float
    loss_end: float
    kept_iteration: int
    unreached: tuple[str, ...] = ()


def square_error(output: Tensor, target: Tensor, weights: Tensor, *_: object) -> Tensor:
    """Sum over the tokens of their weight (samples, tokens) times their mean squared difference, in float32.

    output, target: (samples, tokens, ...). Which samples they are and in which step does not matter here.
    """
    difference = output.float() - target.float()
    return (difference.square().flatten(2).mean(2) * weights).sum()


def enlarged(dtype: torch.dtype, tokens: int) -> float:
    """What a loss that is a mean over `tokens` is multiplied by before its gradient is taken: a power of two.

    float16 ends at 6e-8, where such gradients are rounded to 0. Steps ask for their directions only.
    """
    return 2.0 ** round(math.log2(tokens)) if dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class BlockTask:
    """One block to tune.

    run: hidden states (batch, tokens, hidden) of the samples whose indices (batch,) int64 are given -> the block's
    output of the same shape. linears: the Linears to quantise, whose weights `run` reads. weights: their exact weights
    (out, in). schemes: one for each Linear. loss: what is made small. eager: the same as `run` where that is compiled,
    which can pass over hooks on the Linears.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    linears: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    loss: BlockLoss = square_error
    eager: Callable[[Tensor, Tensor], Tensor] | None = None


def token_weights(targets: Tensor, mask: Tensor | None) -> Tensor:
    """What each token counts in the loss: (samples, tokens) float32 on the targets' device, 0 for padding.

    A token's size is the mean square of its target (samples, tokens, ...). Up to 4 medians it counts 1; above, only as
    much as if its size were that. Most of a plain square error can be that of one token, such as a model's first
    (massive activations, arXiv 2402.17762), and what of it comes from earlier blocks no later one mends.
    """
    sizes = torch.stack([sample.float().square().flatten(1).mean(1) for sample in targets])
    real = torch.ones_like(sizes, dtype=torch.bool) if mask is None else mask.to(sizes.device)
    median = sizes[real].median() if real.any() else sizes.new_zeros(())
    weights = (LARGEST * median / sizes).clamp_max(1) if median else torch.ones_like(sizes)
    return weights * real


def tune_block(
    task: BlockTask,
    activations: Activations,
    recipe: Recipe,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[int, float], None],
    *,
    moment_bytes: int | None = None,
) -> TunedBlock:
    """Choose codes for every Linear of a block.

    on_step is told (iteration, training loss) now and then. The Linears' weights are left at the tuned values.
    moment_bytes: of second moments at once, at least one; as many as W and V will take when None. What does not fit
    (many experts with many inputs each) is gathered by running the block again.
    Raises AutoRoundError naming the layer when a weight or an activation is not finite.
    """
    count = activations.inputs.shape[0]
    order = torch.randperm(count, generator=generator)
    held = min(max(1, round(recipe.heldout * count)), count - 1) if recipe.heldout and count > 1 else 0
    judge, train = (order[:held], order[held:]) if held else (order, order)

    def loss() -> float:
        return evaluate(task, activations, judge, recipe.batch_size, device)

    layers = _plain_layers(task, device, keep=recipe.start == "plain")
    unreached: tuple[str, ...] = ()
    loss_plain = loss_start = loss()
    if recipe.start != "plain":
        room = moment_bytes or STATE_BYTES * sum(weight.numel() for weight in task.weights.values())
        layers, unreached = _start_layers(task, activations, recipe, device, room)
        _write(task, layers)
        loss_start = loss()
    best, best_loss, kept = _snapshot(layers), loss_start, 0
    if not (math.isfinite(loss_plain) and math.isfinite(loss_start)):
        raise AutoRoundError("the block's output is NaN or infinite on the calibration samples")
    checks = {max(1, round(share * recipe.iters)) for share in CHECKPOINTS} if recipe.iters else set()
    for iteration in _steps(task, layers, activations, recipe, train, generator, device, on_step):
        if iteration in checks:
            current = loss()
            if current < best_loss:
                best, best_loss, kept = _snapshot(layers), current, iteration
    for name, tensor in best.items():
        task.linears[name].weight.data.copy_(tensor.dequantize())
    return TunedBlock(best, loss_plain, loss_start, best_loss, kept, unreached)


@torch.no_grad()
def evaluate(task: BlockTask, activations: Activations, rows: Tensor, batch_size: int, device: torch.device) -> float:
    """Mean loss of a token, tokens weighted, of the block with its present weights over the samples `rows`."""
    total = 0.0  # a Python float: not every device has float64
    for batch in rows.split(batch_size):
        inputs, targets, weights = activations.pick(batch, device)
        total += float(task.loss(task.run(inputs, batch), targets, weights, batch, None))
    return total / _tokens(activations, rows)


def _tokens(activations: Activations, rows: Tensor) -> int:
    """How many tokens of the samples `rows` are real, at least one."""
    if activations.mask is None:
        return len(rows) * activations.targets.shape[1]
    return max(1, int(activations.mask[rows].sum()))


@torch.no_grad()
def _plain_layers(task: BlockTask, device: torch.device, *, keep: bool) -> dict[str, Layer]:
    """Give every Linear the weight of the plain start; return the layers if they are to be kept."""
    layers = {}
    for name, linear in task.linears.items():
        layer = _start(task, name, "plain", None, device)
        layer.write_weight(linear.weight.data)
        if keep:
            layers[name] = layer
    return layers


@torch.no_grad()
def _start_layers(
    task: BlockTask, activations: Activations, recipe: Recipe, device: torch.device, room: int
) -> tuple[dict[str, Layer], tuple[str, ...]]:
    """The layers at the start of `recipe`, and the names of those that no token reached.

    A moment is freed as soon as the layers that share it have started; `room` bytes of them are there at once.
    """
    for name, linear in task.linears.items():
        linear.weight.data.copy_(task.weights[name])
    layers: dict[str, Layer] = {}
    unreached: set[str] = set()
    pending = list(task.linears)
    while pending:
        moments = _moments({name: task.linears[name] for name in pending}, room, task, activations, recipe, device)
        unreached |= {name for name in pending if not moments.reached(name)} - set(moments.left())
        for names in moments.shared():
            with _naming(names[0]):
                known = inputs_from(moments.take(names[0]), recipe.start)
            layers.update({name: _start(task, name, recipe.start, known, device) for name in names})
        pending = moments.left()
    return {name: layers[name] for name in task.linears}, tuple(name for name in task.linears if name in unreached)


def _moments(
    linears: Mapping[str, nn.Linear],
    room: int,
    task: BlockTask,
    activations: Activations,
    recipe: Recipe,
    device: torch.device,
) -> Moments:
    """Second moments of the inputs of `linears`, as many as `room` bytes hold, over the samples that were given; over
    those that the model has written, which stand behind them, only while a moment is of few tokens."""
    samples, step = activations.inputs.shape[0], recipe.batch_size * recipe.gradient_accumulate_steps
    with Moments(linears, room) as moments:
        for batch in torch.arange(samples).split(recipe.batch_size):
            first = int(batch[0])
            # Asked where a step's samples end: how many go through at once depends on free memory.
            if first >= samples - recipe.self_nsamples and first % step == 0 and moments.known():
                break
            inputs, mask = activations.masked(batch, device)
            moments.next_batch(mask)
            (task.eager or task.run)(inputs, batch)
    return moments


def _start(task: BlockTask, name: str, kind: str, inputs: Inputs | None, device: torch.device) -> Layer:
    with _naming(name):
        return start_layer(task.weights[name].to(device), task.schemes[name], kind, inputs)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name in front of what is wrong with it."""
    try:
        yield
    except AutoRoundError as error:
        raise AutoRoundError(f"layer {name!r}: {error}") from None


@torch.no_grad()
def _write(task: BlockTask, layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        layer.write_weight(task.linears[name].weight.data)


@torch.no_grad()
def _snapshot(layers: Mapping[str, Layer]) -> dict[str, QuantTensor]:
    return {name: layer.qtensor() for name, layer in layers.items()}


def _steps(
    task: BlockTask,
    layers: Mapping[str, Layer],
    activations: Activations,
    recipe: Recipe,
    train: Tensor,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[int, float], None],
) -> Iterator[int]:
    """Yield the number of steps done after each step, the Linears' weights being those of the new codes."""
    per_step = recipe.per_step(len(train))
    queue = train[:0]
    report_every = max(1, recipe.iters // 20)
    for linear in task.linears.values():
        linear.weight.requires_grad_(True)
    try:
        for iteration in range(recipe.iters):
            if len(queue) < per_step:
                queue = train[torch.randperm(len(train), generator=generator)]
            rows, queue = queue[:per_step], queue[per_step:]
            tokens = _tokens(activations, rows)
            total, boost = torch.zeros((), device=device), enlarged(activations.inputs.dtype, tokens)
            for batch in rows.split(recipe.batch_size):
                inputs, targets, weights = activations.pick(batch, device)
                loss = task.loss(task.run(inputs, batch), targets, weights, batch, iteration) / tokens
                (loss * boost).backward()
                total += loss.detach()
            share = 1 - iteration / recipe.iters
            with torch.no_grad():
                for name, layer in layers.items():
                    weight = task.linears[name].weight
                    if weight.grad is not None:
                        bits = layer.scheme.bits
                        layer.step(weight.grad, recipe.v_lr(bits) * share, recipe.range_lr(bits) * share)
                        weight.grad = None
                        layer.write_weight(weight.data)
            if iteration % report_every == 0:
                on_step(iteration, float(total))
            yield iteration + 1
    finally:
        for linear in task.linears.values():
            linear.weight.requires_grad_(False)
            linear.weight.grad = None
