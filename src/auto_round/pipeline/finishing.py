"""After all blocks: the scales of all layers learn together, by the KL divergence from the original.

Blocks are tuned to give the original's hidden states; this stage asks what matters in the end, the distribution of the
next token. Codes stay. More text than the blocks had helps here, since every scale sees every token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from auto_round.calibrate.capture import NoLogitsError
from auto_round.calibrate.chain import Chain
from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.divergence import kl_divergence
from auto_round.calibrate.front import Walk, behind_blocks
from auto_round.errors import AutoRoundError
from auto_round.pipeline.job import Prepared
from auto_round.qtensor import QuantTensor
from auto_round.runtime.device import peak_device_bytes, peak_resident_bytes
from auto_round.runtime.events import BlockStats, Listener
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.tune.block import enlarged
from auto_round.tune.scales import ScaleState

FINISHED = "finished"  # the journal's title for layers with the scales of this stage; sorted behind those of the blocks
STATE = "finishing"
CHECKS = 8  # times that the held-out samples are looked at, and the state is kept
HELD = 0.0625  # share of the samples that is held out


def finish(prepared: Prepared, journal: Journal, data: CalibrationSet, settings: Walk, listener: Listener) -> None:
    """Learn the scales of all layers in blocks and put them into the journal; an earlier start's steps are not redone.

    data: the samples; the last 1/16 of them only judge. settings: see `Walk`; a step takes as many samples as the
    recipe says, in parts of the batch size there. Raises AutoRoundError when a step's loss is not finite.
    """
    if FINISHED not in journal:
        _Finisher(prepared, journal, data, settings, listener).run()


class _Finisher:
    def __init__(
        self, prepared: Prepared, journal: Journal, data: CalibrationSet, settings: Walk, listener: Listener
    ) -> None:
        self._prepared, self._journal, self._data, self._listener = prepared, journal, data, listener
        self._settings, self._recipe = settings, prepared.job.recipe
        outside = set(prepared.outside)  # found anew each time it is asked for
        inside = [f"{name}.weight" for name in prepared.plan.quantised if name not in outside]
        self._layers = {name: ScaleState(self._tensor(name)) for name in inside}
        self._best: dict[str, Tensor] = {}
        self._heads = _heads(prepared, journal)

    def run(self) -> None:
        """All steps; the scales that were best on the held-out samples go to the journal."""
        begin = time.perf_counter()
        recipe, prepared, settings = self._recipe, self._prepared, self._settings
        chain = Chain(prepared.skeleton, prepared.blocks, settings, self._data.tokens, self._data.beside)
        if chain.final.shape[:2] != self._data.mask.shape:
            self._listener.warn("no finishing: this model adds tokens of its own")
            return
        count = len(self._data.tokens)
        held = torch.arange(count)[-max(1, round(HELD * count)) :]
        batches = self._batches(max(1, count - len(held)))
        with behind_blocks(prepared.skeleton, prepared.blocks, settings.dtype, settings.device):
            self._heads = {m: weight.to(m.weight.device, m.weight.dtype) for m, weight in self._heads.items()}
            done, losses = self._restored()
            if not losses:
                try:
                    losses = [(self._held(chain, held), 0)]
                except NoLogitsError as error:  # the blocks' codes are good without this stage
                    self._listener.warn(f"no finishing: {error}")
                    return
                if not math.isfinite(losses[0][0]):  # a model may rule tokens out by logits of minus infinity
                    self._listener.warn("no finishing: the KL divergence from the original is not finite")
                    return
                self._listener.note(f"finishing: KL divergence {losses[0][0]:.4f} on held-out samples before it")
                self._keep_best()
            checks = {max(1, round(recipe.finish_iters * (k + 1) / CHECKS)) for k in range(CHECKS)}
            for iteration in range(done, recipe.finish_iters):
                loss = self._step(chain, batches[iteration], iteration)
                self._listener.finishing(iteration, recipe.finish_iters, loss)
                if iteration + 1 in checks:
                    losses.append((self._held(chain, held), iteration + 1))
                    self._listener.note(f"finishing: {losses[-1][0]:.4f} on held-out samples, step {iteration + 1}")
                    if losses[-1] == min(losses):
                        self._keep_best()
                    self._save(iteration + 1, losses)
        best = min(losses)
        for name, state in self._layers.items():
            state.multipliers.copy_(self._best[name])
        tensors = {
            name.removesuffix(".weight"): state.applied(self._tensor(name)) for name, state in self._layers.items()
        }
        stats = BlockStats(
            index=len(prepared.blocks),
            name=FINISHED,
            layers=len(tensors),
            loss_plain=None,
            loss_start=losses[0][0],
            loss_end=best[0],
            kept_iteration=best[1],
            seconds=time.perf_counter() - begin,
            peak_bytes=peak_device_bytes(settings.device) or peak_resident_bytes(),
        )
        self._journal.put(FINISHED, tensors, stats)
        self._journal.forget(STATE)
        change = f"{losses[0][0]:.4f} -> {best[0]:.4f}"
        self._listener.note(f"finishing: KL divergence {change} on held-out samples, scales of step {best[1]}")

    def _batches(self, count: int) -> list[Tensor]:
        """The samples of every step: all of them in an order of its own, again and again."""
        recipe = self._recipe
        size = recipe.per_step(count)
        generator, queue, found = generator_for(recipe.seed, "finish"), torch.empty(0, dtype=torch.int64), []
        for _ in range(recipe.finish_iters):
            if len(queue) < size:
                queue = torch.randperm(count, generator=generator)
            found.append(queue[:size])
            queue = queue[size:]
        return found

    def _step(self, chain: Chain, rows: Tensor, iteration: int) -> float:
        recipe = self._recipe
        total, positions = 0.0, int(self._data.mask[rows].sum())
        for part in rows.split(self._settings.batch_size):
            states = chain.forward(part, self._weight)
            final = states[-1].requires_grad_(True)
            total += self._divergence(chain, part, final, positions)
            assert final.grad is not None
            chain.backward(part, states, final.grad, self._weight, self._take)
        if not math.isfinite(total):
            raise AutoRoundError(f"finishing: the KL divergence is not finite at step {iteration + 1}")
        for state in self._layers.values():
            state.step(recipe.scale_lr(state.bits) * (1 - iteration / recipe.finish_iters), iteration + 1)
        return total

    def _take(self, name: str, grad: Tensor) -> None:
        if state := self._layers.get(f"{name}.weight"):
            state.add(self._tensor(f"{name}.weight"), grad)

    def _held(self, chain: Chain, rows: Tensor) -> float:
        positions = int(self._data.mask[rows].sum())
        total = 0.0
        for part in rows.split(self._settings.batch_size):
            final = chain.forward(part, self._weight)[-1]
            total += self._divergence(chain, part, final, positions)
        return total

    def _divergence(self, chain: Chain, rows: Tensor, final: Tensor, positions: int) -> float:
        """KL(original || quantised) summed over real tokens / positions; its gradient, see `enlarged`, is left in
        `final` if it asks."""
        original = chain.final[rows].to(final.device)

        def expected(tokens: slice) -> Tensor:
            with self._head(rounded=False):
                return chain.logits(rows, original, tokens)

        def found(tokens: slice) -> Tensor:
            with self._head(rounded=True):
                return chain.logits(rows, final, tokens)

        boost = enlarged(final.dtype, positions)
        weights = self._data.mask[rows].to(final.device) * (boost / positions)
        return float(kl_divergence(expected, found, weights)) / boost

    @contextmanager
    def _head(self, *, rounded: bool) -> Iterator[None]:
        """Heads that are quantised themselves, with the weights of the original or of the codes."""
        plain = {module: module.weight.data for module in self._heads}
        for module, weight in (self._heads if rounded else plain).items():
            module.weight.data = weight
        try:
            yield
        finally:
            for module, weight in plain.items():
                module.weight.data = weight

    def _weight(self, name: str) -> Tensor:
        """A parameter of a block, with the scales as they stand."""
        if name not in self._layers:
            return self._prepared.skeleton.weight(name)
        return self._layers[name].weight(self._tensor(name))

    def _tensor(self, name: str) -> QuantTensor:
        """Codes and scales that the blocks ended with, by the name of the layer's weight."""
        return self._journal.get(name.removesuffix(".weight")).to(self._settings.device)

    def _keep_best(self) -> None:
        self._best = {name: state.multipliers.clone() for name, state in self._layers.items()}

    def _save(self, done: int, losses: list[tuple[float, int]]) -> None:
        tensors = {f"{name}:{part}": v for name, state in self._layers.items() for part, v in state.parts().items()}
        tensors |= {f"{name}:best": values for name, values in self._best.items()}
        self._journal.keep(STATE, tensors, {"done": done, "losses": losses})

    def _restored(self) -> tuple[int, list[tuple[float, int]]]:
        """Steps done and losses seen by an earlier start, whose state this takes over; (0, []) when there is none."""
        kept = self._journal.kept(STATE)
        if kept is None:
            return 0, []
        tensors, facts = kept
        for name, state in self._layers.items():
            for part, values in state.parts().items():
                values.copy_(tensors[f"{name}:{part}"])
            self._best[name] = tensors[f"{name}:best"].to(state.multipliers.device)
        self._listener.note(f"finishing goes on behind step {facts['done']}")
        return facts["done"], [(loss, step) for loss, step in facts["losses"]]


def _heads(prepared: Prepared, journal: Journal) -> dict[nn.Linear, Tensor]:
    """Quantised layers behind the blocks that the logits come out of, and their weights from the codes."""
    head = prepared.skeleton.model.get_output_embeddings()
    found = {}
    for name in prepared.outside:
        module = prepared.skeleton.model.get_submodule(name)
        if module is head and isinstance(module, nn.Linear):
            found[module] = journal.get(name).dequantize()
    return found
