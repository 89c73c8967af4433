"""The work itself: every block's layers get their codes, which go to the journal before the next block begins."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from auto_round.calibrate.capture import NoLogitsError
from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.divergence import TokenLoss
from auto_round.calibrate.front import Walk, behind_blocks
from auto_round.calibrate.walker import LoadedBlock, head_inputs, walk
from auto_round.errors import AutoRoundError
from auto_round.pipeline.inspection import examine
from auto_round.pipeline.job import Prepared
from auto_round.pipeline.needs import Needs, fewer, micro_batched
from auto_round.pipeline.planning import head_name
from auto_round.qtensor import QuantTensor
from auto_round.runtime.device import peak_device_bytes, peak_resident_bytes, release_cached
from auto_round.runtime.events import BlockStats, Listener
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.runtime.workspace import ACTIVATIONS
from auto_round.source.blocks import text_names
from auto_round.tune.alone import quantise_alone
from auto_round.tune.block import Activations, BlockTask, TunedBlock, tune_block
from auto_round.tune.moments import Moment, Moments
from auto_round.tune.start import inputs_from

OUTSIDE = "outside"  # the journal's title for layers in no block


class Runner:
    """One run over the blocks of a prepared model. Blocks that the journal has already are not done again.

    Such blocks are run, from their codes, so that the next one sees the same activations as in an uninterrupted run.
    Keeping the activations of both chains on disk instead would write 2 x samples x tokens x hidden values after every
    block of every run; running a finished block twice costs 2 x samples forwards, after a crash only, and that is
    2 / (3 x steps x batch / samples) of what tuning it took: 5% with the default recipe.
    """

    def __init__(self, prepared: Prepared, wanted: Needs, journal: Journal, scratch: Path, listener: Listener) -> None:
        """Take a model, what it may use, where finished blocks go, and a folder for activations that leave memory."""
        self._prepared, self._journal, self._listener = prepared, journal, listener
        self._job = micro_batched(prepared.job, wanted.samples_per_forward)
        self._skeleton, self._plan = prepared.skeleton, prepared.plan
        self._cache, self._on_host = scratch / ACTIVATIONS if wanted.on_disk else None, wanted.on_host

    def round_alone(self) -> list[BlockStats]:
        """Round every layer to nearest, without activations."""
        finished = []
        with self._told(0):
            for index, block in enumerate(self._prepared.blocks):
                stats = self._kept(index)
                finished.append(self._round_one(index, block) if stats is None else stats)
            if self._prepared.outside and OUTSIDE not in self._journal:
                self._journal.put(OUTSIDE, {name: self._alone(name, None) for name in self._prepared.outside})
        return finished

    @property
    def settings(self) -> Walk:
        """How blocks are walked over."""
        job, recipe = self._job, self._job.recipe
        return Walk(
            batch_size=recipe.batch_size,
            quantised_inputs=recipe.enable_quanted_input,
            device=job.device,
            dtype=job.dtype,
            store=torch.device("cpu") if self._on_host or self._cache else job.device,
            cache=self._cache,
            compile=recipe.enable_torch_compile,
        )

    def tune(self, calibration: CalibrationSet) -> list[BlockStats]:
        """Tune block after block, each seeing what the quantised ones before it give."""
        recipe, job = self._job.recipe, self._job
        settings = self.settings
        mask = None if bool(calibration.mask.all()) else calibration.mask
        with self._told(recipe.iters):
            if self.complete:
                return [stats for index in range(len(self._prepared.blocks)) if (stats := self._kept(index))]
            finished, final = [], None
            for loaded in walk(self._skeleton, self._prepared.blocks, calibration.tokens, settings, calibration.beside):
                if mask is not None and loaded.inputs.shape[1] != mask.shape[1]:
                    self._listener.warn("this model adds tokens of its own; padding counts as text then")
                    mask = None
                finished.append(self._restored(loaded) or self._tune_one(loaded, calibration, mask))
                final = loaded.inputs if settings.quantised_inputs else loaded.targets
                release_cached(job.device)
            if self._prepared.outside and final is not None:
                self._heads(calibration, final, settings)
        unreached = sum(stats.unreached for stats in finished)
        if unreached:
            self._listener.warn(
                f"{unreached} layers were reached by no calibration token and are quantised from their weights alone; "
                "more samples (nsamples, seqlen) reach more experts"
            )
        return finished

    @contextmanager
    def _told(self, iters: int) -> Iterator[None]:
        """Tell the listener of the beginning and the end, and of what is done already."""
        for title in self._journal.damaged:
            self._listener.warn(f"{title} in the journal is damaged, as after a power cut; it is done again")
        done = len(self._journal)
        if done:
            self._listener.note(f"going on with an unfinished run: {done} of its blocks are done")
        self._listener.begin(len(self._prepared.blocks), iters, done)
        try:
            yield
        finally:
            self._listener.end()

    def _kept(self, index: int) -> BlockStats | None:
        """What was measured of block `index` when it is in the journal."""
        title = _title(index)
        return self._journal.stats(title) if title in self._journal else None

    @property
    def complete(self) -> bool:
        """True when every block is in the journal, and what lies outside."""
        titles = [_title(index) for index in range(len(self._prepared.blocks))]
        return all(title in self._journal for title in [*titles, *([OUTSIDE] if self._prepared.outside else [])])

    def _restored(self, loaded: LoadedBlock) -> BlockStats | None:
        """Give a block that is done already its codes' weights; None when it is not done."""
        stats = self._kept(loaded.index)
        if stats is not None and loaded.run is not None:
            for name, linear in loaded.linears.items():
                if name in self._plan.quantised:
                    linear.weight.data.copy_(self._journal.get(name).dequantize())
        return stats

    def _round_one(self, index: int, block: str) -> BlockStats:
        begin = time.perf_counter()
        self._listener.block_started(index, block)
        mine = sorted(self._prepared.inside(block), key=lambda name: self._skeleton.stack_of(f"{name}.weight"))
        tensors = {name: self._alone(name, None) for name in mine}
        return self._finish(tensors, self._stats(index, block, len(mine), begin, None))

    def _finish(self, tensors: Mapping[str, QuantTensor], stats: BlockStats) -> BlockStats:
        self._journal.put(_title(stats.index), tensors, stats)
        self._listener.block_finished(stats)
        return stats

    def _tune_one(self, loaded: LoadedBlock, calibration: CalibrationSet, mask: Tensor | None) -> BlockStats:
        begin = time.perf_counter()
        self._listener.block_started(loaded.index, loaded.name)
        planned = {name: linear for name, linear in loaded.linears.items() if name in self._plan.quantised}
        if not planned:
            return self._finish({}, self._stats(loaded.index, loaded.name, 0, begin, None))
        if loaded.run is None:  # a block for images, on text
            tensors = {name: self._alone(name, None) for name in planned}
            stats = self._stats(loaded.index, loaded.name, len(planned), begin, None)
            return self._finish(tensors, replace(stats, unreached=len(planned)))
        weights = self._skeleton.weights([f"{name}.weight" for name in planned])
        task = BlockTask(
            run=loaded.run,
            linears=planned,
            weights={name: weights[f"{name}.weight"] for name in planned},
            schemes={name: scheme for name in planned if (scheme := self._plan.quantised[name].scheme) is not None},
            eager=loaded.eager,
        )
        last = loaded.index == len(self._prepared.blocks) - 1
        by_tokens = last and self._prepared.last_by_tokens
        tuned = self._tuned_by_tokens(loaded, task, calibration, mask) if by_tokens else None
        if tuned is None:
            tuned = self._tuned(loaded, task, Activations.of(loaded.inputs, loaded.targets, mask))
        return self._finish(tuned.tensors, self._stats(loaded.index, loaded.name, len(planned), begin, tuned))

    def _tuned_by_tokens(
        self, loaded: LoadedBlock, task: BlockTask, calibration: CalibrationSet, mask: Tensor | None
    ) -> TunedBlock | None:
        """Tune the last block by the KL divergence of the model's tokens; None where the model does not show them."""
        skeleton, names, device = self._skeleton, self._prepared.blocks, self._job.device
        # Where there are images, or the model adds tokens of its own, it cannot be run on the tokens alone.
        if calibration.beside or loaded.targets.shape[:2] != calibration.tokens.shape:
            return None
        loss = TokenLoss(skeleton, names, calibration.tokens, self._job.recipe.seed)
        activations = Activations(loaded.inputs, loaded.targets, mask, calibration.mask.float())
        with behind_blocks(skeleton, names, self._job.dtype, device):
            first = torch.tensor([0])
            _, target, weights = activations.pick(first, device)
            try:
                tried = loss(target, target, weights, first)
            except NoLogitsError:
                return None
            if not tried.isfinite():  # the model rules tokens out by logits of minus infinity
                return None
            return self._tuned(loaded, replace(task, loss=loss), activations)

    def _tuned(self, loaded: LoadedBlock, task: BlockTask, activations: Activations) -> TunedBlock:
        """Tune one block, with fewer samples at once when the device's memory is too small.

        The block then begins anew with the same draws. Gradients add up over more parts, the same but for rounding.
        """
        while True:
            recipe = self._job.recipe
            try:
                return tune_block(
                    task,
                    activations,
                    recipe,
                    generator_for(recipe.seed, "block", loaded.index),
                    self._job.device,
                    lambda iteration, loss: self._listener.step(loaded.index, iteration, loss),
                )
            except AutoRoundError as error:
                raise type(error)(f"{loaded.name}: {error}") from None
            except torch.cuda.OutOfMemoryError as error:  # that of every accelerator, under its oldest name
                if recipe.batch_size == 1:
                    raise AutoRoundError(
                        f"{loaded.name}: {self._job.device} has too little memory even for one sample at a time: "
                        f"{error}\nLower seqlen, pass low_gpu_mem_usage, or choose another device."
                    ) from None
            self._job = micro_batched(self._job, fewer(recipe.batch_size))
            self._listener.warn(
                f"{loaded.name}: {self._job.device} ran out of memory; going on with {self._job.recipe.batch_size} "
                f"samples at a time instead of {recipe.batch_size}, as many in a step as before"
            )
            release_cached(self._job.device)

    def _heads(self, calibration: CalibrationSet, final: Tensor, settings: Walk) -> None:
        """Layers outside the blocks: range search and compensated rounding on their real inputs, no steps.

        What does not run on text (vision) is quantised from its weights alone.
        """
        text, done = text_names(self._skeleton.model, self._prepared.outside), {}
        for name in self._prepared.outside:
            head = self._skeleton.model.get_submodule(name)
            assert isinstance(head, nn.Linear)
            moments = Moments({name: head})
            if name in text or name == head_name(self._skeleton):
                blocks, tokens = self._prepared.blocks, calibration.tokens
                for rows, inputs in head_inputs(
                    self._skeleton, blocks, tokens, final, head, settings, calibration.beside
                ):
                    moments.next_batch(calibration.mask[rows].to(inputs.device))
                    moments.observe(name, inputs)
            done[name] = self._alone(name, moments.take(name))
        self._journal.put(OUTSIDE, done)

    def _alone(self, name: str, moment: Moment | None) -> QuantTensor:
        scheme = self._plan.quantised[name].scheme
        assert scheme is not None
        weight = self._skeleton.weight(name + ".weight")
        examine(name, weight, scheme)
        kind = self._job.recipe.start
        try:
            return quantise_alone(weight, scheme, kind, inputs_from(moment, kind), self._job.device)
        except AutoRoundError as error:
            raise type(error)(f"layer {name!r}: {error}") from None

    def _stats(self, index: int, name: str, layers: int, begin: float, tuned: TunedBlock | None) -> BlockStats:
        return BlockStats(
            index=index,
            name=name,
            layers=layers,
            loss_plain=tuned.loss_plain if tuned else None,
            loss_start=tuned.loss_start if tuned else None,
            loss_end=tuned.loss_end if tuned else None,
            kept_iteration=tuned.kept_iteration if tuned else 0,
            seconds=time.perf_counter() - begin,
            peak_bytes=peak_device_bytes(self._job.device) or peak_resident_bytes(),
            unreached=len(tuned.unreached) if tuned else 0,
        )


def _title(index: int) -> str:
    """What the journal calls a block."""
    return f"block-{index:05d}"
