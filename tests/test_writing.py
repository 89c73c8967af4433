"""Text that the model writes itself: kept when a run is killed, foreseen, and refused before any work."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.errors import OutputError, SourceError, SpecError
from auto_round.runtime.events import BlockStats, LogListener
from tests.conftest import tiny_llama, tiny_tokenizer


class Listening(LogListener):
    """Keeps what it hears of writing."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds, self.totals = list[int](), set[int]()

    def writing(self, done: int, total: int) -> None:
        self.rounds.append(done)
        self.totals.add(total)


class Stopped(Listening):
    """Stops a run in the round `stop` of writing, or when tuning begins."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__()
        self.stop = stop

    def writing(self, done: int, total: int) -> None:
        super().writing(done, total)
        if done == self.stop:
            raise KeyboardInterrupt

    def begin(self, blocks: int, iters: int, done: int = 0) -> None:
        raise KeyboardInterrupt


def write(model: Path, output: Path, stop: int = 0, **changes: Any) -> Stopped:
    """Write 2400 texts of 8 tokens, of which 2048 are written together, and stop."""
    listener = Stopped(stop)
    rows = torch.randint(5, 60, (8, 32), generator=torch.Generator().manual_seed(0))
    settings = {"dataset": rows, "nsamples": 8, "self_nsamples": 600, "seqlen": 32, "group_size": 32, **changes}
    run = AutoRound(
        model, tiny_tokenizer(), device="cpu", compute_dtype="float32", iters=2, listener=listener, **settings
    )
    with pytest.raises(KeyboardInterrupt):
        run.quantize_and_save(output)
    return listener


def kept(output: Path) -> torch.Tensor:
    (file,) = output.with_name(f".{output.name}.auto-round").glob("written/*")
    return load_file(file)["tokens"]


def test_a_killed_run_keeps_the_texts_that_are_finished(llama_folder: Path, tmp_path: Path) -> None:
    whole = write(llama_folder, tmp_path / "whole")
    (total,) = whole.totals
    assert whole.rounds == list(range(1, total + 1))
    write(llama_folder, tmp_path / "out", stop=total - 1)
    goes_on = write(llama_folder, tmp_path / "out")
    assert min(goes_on.rounds) == total // 2 + 1
    assert kept(tmp_path / "out").shape == (2400, 8)
    assert kept(tmp_path / "out").equal(kept(tmp_path / "whole"))
    assert write(llama_folder, tmp_path / "out", bits=2).rounds == []  # nothing of the scheme decides the texts
    assert write(llama_folder, tmp_path / "out", seed=7).rounds


def test_nothing_stays_of_a_run_that_is_done(llama_folder: Path, tmp_path: Path) -> None:
    settings = {"nsamples": 8, "seqlen": 32, "iters": 1, "group_size": 32}
    run = AutoRound(llama_folder, tiny_tokenizer(), dataset="self", device="cpu", compute_dtype="float32", **settings)
    report = run.quantize_and_save(tmp_path / "out")
    assert report.calibration is not None
    assert report.calibration["source"] == "self (sampled by the model)"
    assert report.calibration["tokens"] == 8 * 32
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_what_is_done_is_not_written_again(llama_folder: Path, tmp_path: Path) -> None:
    listener, rows = Listening(), torch.randint(5, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    settings = {"nsamples": 4, "seqlen": 16, "iters": 1, "group_size": 32, "device": "cpu", "compute_dtype": "float32"}
    for dataset, own in (("self", 0), (rows, 2), ("self", 2)):
        run = AutoRound(
            llama_folder, tiny_tokenizer(), dataset=dataset, self_nsamples=own, listener=listener, **settings
        )
        first = run.quantize_and_save(tmp_path / "out", overwrite=True)
        rounds = len(listener.rounds)
        assert rounds
        assert run.quantize_and_save(tmp_path / "out").signature == first.signature
        assert len(listener.rounds) == rounds
        listener.rounds.clear()


def test_memory_that_cannot_hold_the_whole_model_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    run = AutoRound(
        llama_folder, tiny_tokenizer(), dataset="self", device="cpu", group_size=32, max_memory="10MB", seqlen=32
    )
    with pytest.raises(SpecError, match=r"writing needs about .* GB .*give text in the place"):
        run.quantize_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    forecast = run.plan(tmp_path / "out")
    assert forecast.memory["writing"] > 10**7
    assert any("writing needs" in problem for problem in forecast.problems)


@pytest.mark.parametrize(("asked", "name"), [({"dataset": "self"}, "the set self"), ({"self_nsamples": 2}, "self_ns")])
def test_a_model_without_a_tokenizer_cannot_write(tmp_path: Path, asked: dict[str, Any], name: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(SpecError, match=f"{name}.* needs a tokenizer"):
        AutoRound(tmp_path / "plain", device="cpu", group_size=32, **asked).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_another_job(llama_folder: Path, tmp_path: Path) -> None:
    settings = {"nsamples": 4, "seqlen": 16, "iters": 1, "group_size": 32, "device": "cpu", "compute_dtype": "float32"}
    AutoRound(llama_folder, tiny_tokenizer(), dataset="self", **settings).quantize_and_save(tmp_path / "out")
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": [other.convert_ids_to_tokens(50)]})  # no text any more
    with pytest.raises(OutputError, match="is not empty"):
        AutoRound(llama_folder, other, dataset="self", **settings).quantize_and_save(tmp_path / "out")


def test_a_model_that_cannot_write_says_so(llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(1000)])  # the embeddings have no row for them
    run = AutoRound(llama_folder, tokenizer, dataset="self", nsamples=4, seqlen=16, group_size=32, device="cpu")
    with pytest.raises(SourceError, match=r"the model cannot write text: transformers .* says IndexError"):
        run.quantize_and_save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_jobs_work_is_refused_before_anything_is_written(llama_folder: Path, tmp_path: Path) -> None:
    listener = Stopped()
    settings = {"nsamples": 8, "seqlen": 32, "group_size": 32, "iters": 1, "device": "cpu", "compute_dtype": "float32"}
    texts = ["the quick brown fox. " * 8] * 8
    AutoRound(llama_folder, tiny_tokenizer(), dataset=texts, **settings).quantize_and_save(tmp_path / "done")
    (tmp_path / ".other.auto-round").mkdir()
    (tmp_path / ".other.auto-round" / "job.json").write_text('{"scheme": "W8A16"}')
    for folder, said in (("done", "is not empty"), ("other", "scheme: W8A16 there, W4A16G32 here")):
        run = AutoRound(llama_folder, tiny_tokenizer(), dataset="self", listener=listener, **settings)
        with pytest.raises(OutputError, match=said):
            run.quantize_and_save(tmp_path / folder)
    assert listener.rounds == []


class AfterOneBlock(LogListener):
    """Stops a run when its first block is done."""

    def block_finished(self, stats: BlockStats) -> None:
        raise KeyboardInterrupt


def test_unfinished_work_outlives_runs_that_do_not_replace_it(llama_folder: Path, tmp_path: Path) -> None:
    settings = {"nsamples": 8, "seqlen": 32, "group_size": 32, "iters": 1, "device": "cpu", "compute_dtype": "float32"}
    texts = ["the quick brown fox. " * 8] * 8

    def run(**changes: Any) -> AutoRound:
        return AutoRound(llama_folder, tiny_tokenizer(), **{"dataset": texts, **settings, **changes})

    first = run().quantize_and_save(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(bits=8, listener=AfterOneBlock()).quantize_and_save(tmp_path / "out", overwrite=True)
    blocks = list((tmp_path / ".out.auto-round" / "blocks").iterdir())
    assert len(blocks) == 1
    assert run().quantize_and_save(tmp_path / "out").signature == first.signature  # nothing to do
    with pytest.raises(SpecError, match="writing needs"):
        run(bits=2, dataset="self", max_memory="10MB").quantize_and_save(tmp_path / "out", overwrite=True)
    assert list((tmp_path / ".out.auto-round" / "blocks").iterdir()) == blocks


def test_a_full_disk_is_not_the_tokenizers_fault(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("auto_round.runtime.journal.write_durably", full)
    run = AutoRound(llama_folder, tiny_tokenizer(), dataset="self", nsamples=4, seqlen=16, group_size=32, device="cpu")
    with pytest.raises(OutputError, match=r"written: the disk is full\. What is done is kept"):
        run.quantize_and_save(tmp_path / "out")


def test_memory_for_tuning_is_looked_at_before_anything_is_written(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Stopped()
    monkeypatch.setattr("auto_round.pipeline.writing.writing_bytes", lambda *_: (0, 0))
    run = AutoRound(
        llama_folder,
        tiny_tokenizer(),
        dataset="self",
        group_size=32,
        device="cpu",
        max_memory="10MB",
        listener=listener,
    )
    with pytest.raises(SpecError, match=r"needs about .* GB .*lower seqlen"):
        run.quantize_and_save(tmp_path / "out")
    assert listener.rounds == []
