"""The work itself: every block's layers get their codes, which go to the journal before the next block begins."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.walker import LoadedBlock, Walk, head_inputs, walk
from auto_round.errors import AutoRoundError
from auto_round.pipeline.job import Prepared
from auto_round.qtensor import QTensor
from auto_round.runtime.device import peak_device_bytes, peak_resident_bytes, release_cached
from auto_round.runtime.events import BlockStats, Listener
from auto_round.runtime.journal import Journal
from auto_round.runtime.rng import generator_for
from auto_round.tune.alone import quantise_alone
from auto_round.tune.block import Activations, BlockTask, TunedBlock, tune_block
from auto_round.tune.moments import Moments


class Runner:
    """One run over the blocks of a prepared model."""

    def __init__(self, prepared: Prepared, journal: Journal, listener: Listener) -> None:
        self._prepared, self._journal, self._listener = prepared, journal, listener
        self._job, self._skeleton, self._plan = prepared.job, prepared.skeleton, prepared.plan

    def round_alone(self) -> list[BlockStats]:
        """Round every layer to nearest, without activations."""
        finished = []
        self._listener.begin(len(self._prepared.blocks), 0)
        try:
            for index, block in enumerate(self._prepared.blocks):
                begin = time.perf_counter()
                self._listener.block_started(index, block)
                mine = [name for name in self._plan.quantised if name.startswith(block + ".")]
                self._journal.put(f"block-{index:05d}", {name: self._alone(name, None) for name in mine})
                finished.append(self._stats(index, block, len(mine), begin, None))
                self._listener.block_finished(finished[-1])
            if self._prepared.outside:
                self._journal.put("outside", {name: self._alone(name, None) for name in self._prepared.outside})
        finally:
            self._listener.end()
        return finished

    def tune(self, calibration: CalibrationSet) -> list[BlockStats]:
        """Tune block after block, each seeing what the quantised ones before it give."""
        recipe, job = self._job.recipe, self._job
        settings = Walk(
            batch_size=recipe.batch_size,
            quantised_inputs=recipe.enable_quanted_input,
            device=job.device,
            dtype=job.dtype,
            store=torch.device("cpu") if recipe.low_gpu_mem_usage else job.device,
            compile=recipe.enable_torch_compile,
        )
        mask = None if bool(calibration.mask.all()) else calibration.mask
        finished: list[BlockStats] = []
        self._listener.begin(len(self._prepared.blocks), recipe.iters)
        try:
            final = None
            for loaded in walk(self._skeleton, self._prepared.blocks, calibration.tokens, settings):
                finished.append(self._tune_one(loaded, mask))
                final = loaded.inputs if settings.quantised_inputs else loaded.targets
                release_cached(job.device)
            if self._prepared.outside and final is not None:
                self._heads(calibration, final, settings)
        finally:
            self._listener.end()
        return finished

    def _tune_one(self, loaded: LoadedBlock, mask: Tensor | None) -> BlockStats:
        begin = time.perf_counter()
        self._listener.block_started(loaded.index, loaded.name)
        planned = {name: linear for name, linear in loaded.linears.items() if name in self._plan.quantised}
        if not planned:
            return self._stats(loaded.index, loaded.name, 0, begin, None)
        task = BlockTask(
            run=loaded.run,
            linears=planned,
            weights={name: self._skeleton.weight(name + ".weight") for name in planned},
            schemes={name: scheme for name in planned if (scheme := self._plan.quantised[name].scheme) is not None},
        )
        try:
            tuned = tune_block(
                task,
                Activations(loaded.inputs, loaded.targets, mask),
                self._job.recipe,
                generator_for(self._job.recipe.seed, "block", loaded.index),
                self._job.device,
                lambda iteration, loss: self._listener.step(loaded.index, iteration, loss),
            )
        except AutoRoundError as error:
            raise AutoRoundError(f"{loaded.name}: {error}") from None
        self._journal.put(f"block-{loaded.index:05d}", tuned.tensors)
        stats = self._stats(loaded.index, loaded.name, len(planned), begin, tuned)
        self._listener.block_finished(stats)
        return stats

    def _heads(self, calibration: CalibrationSet, final: Tensor, settings: Walk) -> None:
        """Layers behind the blocks: range search and compensated rounding on their real inputs, no steps."""
        done = {}
        for name in self._prepared.outside:
            head = self._skeleton.model.get_submodule(name)
            assert isinstance(head, nn.Linear)
            moments = Moments({name: head})
            batches = head_inputs(self._skeleton, self._prepared.blocks, calibration.tokens, final, head, settings)
            for rows, inputs in batches:
                moments.next_batch(calibration.mask[rows].to(inputs.device))
                moments.observe(name, inputs)
            done[name] = self._alone(name, moments.of(name))
        self._journal.put("outside", done)

    def _alone(self, name: str, moment: Tensor | None) -> QTensor:
        scheme = self._plan.quantised[name].scheme
        assert scheme is not None
        weight = self._skeleton.weight(name + ".weight")
        try:
            return quantise_alone(weight, scheme, self._job.recipe.start, moment, self._job.device)
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
        )
