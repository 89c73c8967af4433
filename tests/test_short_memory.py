"""Less memory, the same result: activations on disk, fewer samples at once, a device that runs out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.errors import AutoRoundError, OutputError, SpecError
from auto_round.load import load_qtensors
from auto_round.pipeline import flow, runner
from tests import killing


def tuned(model: Path, output: Path, **changes: Any) -> bytes:
    AutoRound(model, **{**killing.SETTINGS, **changes}).quantize_and_save(output)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("quanted", [True, False])
def test_activations_on_disk_change_no_byte(llama_folder: Path, tmp_path: Path, quanted: bool) -> None:
    plain = tuned(llama_folder, tmp_path / "a", enable_quanted_input=quanted)
    assert tuned(llama_folder, tmp_path / "b", enable_quanted_input=quanted, activations_on_disk=True) == plain
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b"]


def test_too_little_memory_is_refused_before_tuning(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"max_memory allows 0\.10 GB"):
        tuned(llama_folder, tmp_path / "out", max_memory="100MB")
    assert list(tmp_path.iterdir()) == []


class Device:
    """Stands for a device that holds at most `room` samples in one forward of a step."""

    def __init__(self, room: int) -> None:
        self.room, self.tune, self.tried = room, runner.tune_block, list[int]()

    def __call__(self, task: Any, activations: Any, recipe: Any, *rest: Any) -> Any:
        self.tried.append(recipe.batch_size)
        if recipe.batch_size > self.room:
            task.linears[next(iter(task.linears))].weight.data.zero_()  # stopped in the middle of its work
            raise torch.cuda.OutOfMemoryError("out of memory")
        return self.tune(task, activations, recipe, *rest)


def test_a_device_that_runs_out_gets_fewer_samples_and_the_same_steps(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A plain start: a better one chooses codes by sums over samples, and steps make more of how these round.
    tuned(llama_folder, tmp_path / "whole", start="plain")
    device = Device(2)
    monkeypatch.setattr(runner, "tune_block", device)
    tuned(llama_folder, tmp_path / "parts", start="plain")
    assert device.tried == [4, 2, 2]  # found out once, kept for the next block
    same = total = 0
    other = dict(load_qtensors(tmp_path / "parts"))
    for name, tensor in load_qtensors(tmp_path / "whole"):
        same += int((tensor.codes == other[name].codes).sum())
        total += tensor.codes.numel()
    assert same > 0.999 * total  # but for gradients next to 0; steps of 2 samples give 0.992
    device.room = 0
    with pytest.raises(AutoRoundError, match="even for one sample"):
        tuned(llama_folder, tmp_path / "none")


def test_a_disk_that_is_too_small_is_refused_before_tuning(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_round.pipeline import publishing

    usage = publishing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda _: usage._replace(free=50_000_000))
    with pytest.raises(OutputError, match=r"0\.06 GB are needed on this disk"):
        tuned(llama_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(1, 12))
def test_a_disk_that_fills_loses_nothing(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The `call`-th attempt to force something to disk finds it full."""
    left, fsync = [call], os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"disk is full.*same command goes on"):
            tuned(llama_folder, tmp_path / "out", recipe="rtn", start="plain", iters=0)
    assert not (tmp_path / "out").exists()
    tuned(llama_folder, tmp_path / "out", recipe="rtn", start="plain", iters=0)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("finish_iters", [0, 1])
def test_activations_on_disk_count_and_are_gone_before_the_output_is_written(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish_iters: int
) -> None:
    from auto_round.pipeline import publishing

    tokens = torch.randint(3, 98, (96, 64), generator=torch.Generator().manual_seed(0))
    changes: dict[str, Any] = {"finish_iters": finish_iters, "activations_on_disk": True, "iters": 1}
    changes |= {"dataset": tokens, "nsamples": 96, "seqlen": 64}  # more bytes than the output's
    there: list[bool] = []
    published = flow.publish

    def watched(result: Any, saving: Any, work: Any, listener: Any) -> Any:
        there.append((work.folder / "activations").exists())
        if not there[1:]:
            raise KeyboardInterrupt
        return published(result, saving, work, listener)

    monkeypatch.setattr(flow, "publish", watched)
    tuner = AutoRound(llama_folder, **{**killing.SETTINGS, **changes})
    forecast = tuner.plan(tmp_path / "out")
    outputs = sum(forecast.formats[0].files.values())
    needed = publishing.SPARE + forecast.disk_bytes
    assert forecast.disk_bytes > forecast.journal_bytes + 2 * outputs
    usage = publishing.shutil.disk_usage(tmp_path)

    def leave(free: int) -> None:
        monkeypatch.setattr(publishing.shutil, "disk_usage", lambda _: usage._replace(free=free))

    leave(needed - 1000)
    with pytest.raises(OutputError, match="needed on this disk"):
        tuner.quantize_and_save(tmp_path / "out")
    assert tuner.plan(tmp_path / "out").problems
    leave(needed)
    with pytest.raises(KeyboardInterrupt):
        tuner.quantize_and_save(tmp_path / "out")
    leave(publishing.SPARE + forecast.journal_bytes + outputs)  # all blocks are done: there will be none
    tuner.quantize_and_save(tmp_path / "out")
    assert there == [False, False]
