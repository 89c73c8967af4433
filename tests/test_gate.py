"""The end gate: a good result passes, a bad one fails and is named, and neither costs the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.errors import CheckError
from auto_round.evaluate.metrics import compare, evaluate_tokens, held_out_text
from auto_round.pipeline import gate
from tests.conftest import VOCABULARY, tiny_llama, tiny_tokenizer, tiny_xlnet

RTN: dict[str, Any] = {"group_size": 32, "recipe": "rtn", "device": "cpu", "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of its next token, so that rounding can do harm: logits 60 times those of a fresh one."""
    folder = tmp_path_factory.mktemp("sharp")
    model = tiny_llama(num_hidden_layers=3)
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data *= 20
    model.lm_head.weight.data *= 60
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_numbers_are_those_of_opening_both_models(sharp: Path, tmp_path: Path) -> None:
    report = AutoRound(sharp, bits=8, **RTN).quantize_and_save(tmp_path / "out")
    assert report.check is not None
    codes, opened = report.check["findings"]
    assert (codes["opened"], opened["opened"]) == ("block by block", "auto_round")
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (sharp, tmp_path / "out")]
    expected = compare(*models, evaluate_tokens(tiny_tokenizer(), held_out_text(), 64, 2))
    for finding in (codes, opened):
        assert finding["kl_divergence"] == pytest.approx(expected.kl_divergence, rel=0.02)
        assert finding["top1_agreement"] == pytest.approx(expected.top1_agreement, abs=0.01)
        ratio = expected.perplexity / expected.perplexity_reference
        assert finding["perplexity_ratio"] == pytest.approx(ratio, rel=0.01)
    assert 0 < expected.kl_divergence < 1
    assert json.loads((tmp_path / "out" / "auto_round.json").read_text())["result"]["check"] == report.check


def test_a_bad_result_fails_names_its_worst_block_and_stays(sharp: Path, tmp_path: Path) -> None:
    rules = {"*.layers.0.*": {"bits": 8}, "*.layers.2.*": {"bits": 8}}
    with pytest.raises(CheckError, match=r"block by block: KL(.|\n)*relative error: model\.layers\.1 ") as error:
        AutoRound(sharp, bits=2, layer_config=rules, **RTN).quantize_and_save(tmp_path / "out", max_kl=0.01)
    assert "--max_kl" in str(error.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"]
    tuner = AutoRound(sharp, bits=2, layer_config=rules, **RTN)
    with pytest.raises(CheckError, match="block by block: KL"):  # nothing is to be done, and it is as bad as before
        tuner.quantize_and_save(tmp_path / "out", max_kl=0.01)
    assert tuner.quantize_and_save(tmp_path / "out", max_kl=50).check is not None
    AutoRound(sharp, bits=2, **RTN).quantize_and_save(tmp_path / "off", enable_check=False, max_kl=0.01)


def test_nan_is_bad_whatever_the_bound(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckError, match="nan"):
        AutoRound(tmp_path / "model", **RTN).quantize_and_save(tmp_path / "out", max_kl=1e9)


def test_nothing_is_compared_without_text(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    report = AutoRound(tmp_path / "model", **RTN).quantize_and_save(tmp_path / "out")
    assert report.check is None


def test_a_model_that_shows_no_logits_is_written_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_xlnet().save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    tuner = AutoRound(tmp_path / "model", scheme="W2A16G32", dataset=tokens, iters=1, nsamples=4, seqlen=16)
    with caplog.at_level("INFO"):
        report = tuner.quantize_and_save(tmp_path / "out")
    assert report.check is None
    assert "not compared with the original: XLNetLMHeadModel gave no logits" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_device_too_small_for_the_whole_result_says_nothing_against_it(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gate, "_through_transformers", full)
    report = AutoRound(sharp, bits=8, **RTN).quantize_and_save(tmp_path / "out")
    assert report.check is not None
    assert [finding["opened"] for finding in report.check["findings"]] == ["block by block"]
    assert report.check["notes"] == ["auto_round: not opened through transformers: it needs more memory than cpu has"]
    assert report.check["faults"] == []
