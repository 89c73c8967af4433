"""The whole road on tiny models: tune, save, open with plain transformers, compare with the dequantised original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from auto_round import AutoRound
from auto_round.errors import FormatError, OutputError, SourceError, SpecError
from auto_round.load import dequantized_state_dict, load_qtensors
from auto_round.pipeline.runner import Runner
from tests import killing
from tests.conftest import VOCABULARY, tiny_llama, tiny_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 4, "pack my box with five dozen liquor jugs! " * 4] * 4


def tune(model: Any, output: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "group_size": 32,
        "iters": 4,
        "nsamples": 8,
        "seqlen": 32,
        "batch_size": 4,
        "dataset": TEXTS,
        "device": "cpu",
        "compute_dtype": "float32",
        **changes,
    }
    AutoRound(model, **settings).quantize_and_save(output)
    return output


def same_as_dequantised(source: Path, folder: Path, tokens: torch.Tensor) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = plain(tokens).logits
    missing, unexpected = plain.load_state_dict(
        {name: tensor.float() for name, tensor in dequantized_state_dict(folder).items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    expected = plain(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": 2},
        {"bits": 3, "group_size": 64},
        {"bits": 8},
        {"sym": False},
        {"bits": 2, "sym": False},
        {"group_size": -1},
        {"group_size": 128},
        {"iters": 0},
        {"recipe": "rtn", "iters": 0},
        {"start": "plain", "heldout": 0.0},
        {"enable_quanted_input": False},
        {"enable_minmax_tuning": False},
        {"low_gpu_mem_usage": True},
        {"batch_size": 2, "gradient_accumulate_steps": 2},
        {"compute_dtype": "bfloat16"},
        {"quant_lm_head": True},
        {"quant_lm_head": True, "recipe": "rtn", "iters": 0},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "default",
)
def test_transformers_computes_with_the_dequantised_weights(
    llama_folder: Path, tmp_path: Path, tokens: torch.Tensor, changes: dict[str, Any]
) -> None:
    folder = tune(llama_folder, tmp_path / "out", **changes)
    same_as_dequantised(llama_folder, folder, tokens)


def test_layers_of_an_opt_can_have_bits_of_their_own(tmp_path: Path, tokens: torch.Tensor) -> None:
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    name = "model.decoder.layers.1.self_attn.out_proj"
    folder = tune(
        tmp_path / "opt",
        tmp_path / "out",
        layer_config={name: {"bits": 2, "group_size": 32}, "*.layers.0.fc1": "keep"},
    )
    tensors = dict(load_qtensors(folder))
    assert (tensors[name].scheme.bits, tensors[name].scheme.group_size) == (2, 32)
    assert "model.decoder.layers.0.fc1" not in tensors
    assert {tensor.scheme.bits for other, tensor in tensors.items() if other != name} == {4}
    same_as_dequantised(tmp_path / "opt", folder, tokens)


def test_the_same_seed_gives_the_same_bytes(llama_folder: Path, tmp_path: Path) -> None:
    first, second = tune(llama_folder, tmp_path / "a" / "out"), tune(llama_folder, tmp_path / "b" / "out")
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    for name in set(names) - {"auto_round.json"}:  # it names the folder
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_seed_gives_other_codes(llama_folder: Path, tmp_path: Path) -> None:
    first, second = tune(llama_folder, tmp_path / "a"), tune(llama_folder, tmp_path / "b", seed=7)
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_what_is_not_quantised_passes_through(llama_folder: Path, tmp_path: Path) -> None:
    folder = tune(llama_folder, tmp_path / "out")
    before, after = load_file(llama_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = {name for name in before if "proj" not in name}
    assert len(kept) == 7
    for name in kept:
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype
    config, original = (json.loads((f / "config.json").read_text()) for f in (folder, llama_folder))
    written = config.pop("quantization_config")
    assert config == original
    assert (written["quant_method"], written["bits"], written["group_size"], written["sym"]) == (
        "auto-round",
        4,
        32,
        True,
    )
    text = "some text"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(llama_folder)(text)


def test_tuning_lowers_the_error_of_plain_rounding(llama_folder: Path, tmp_path: Path) -> None:
    tuner = AutoRound(
        llama_folder,
        bits=2,
        group_size=32,
        iters=20,
        nsamples=8,
        seqlen=32,
        batch_size=4,
        dataset=TEXTS,
        device="cpu",
        compute_dtype="float32",
    )
    for block in tuner.quantize_and_save(tmp_path / "out").blocks:
        assert block.loss_end is not None
        assert block.loss_plain is not None
        assert block.loss_end < 0.9 * block.loss_plain


def test_a_loaded_model_is_a_source(tmp_path: Path, llama_folder: Path, tokens: torch.Tensor) -> None:
    folder = tune(tiny_llama(), tmp_path / "out", tokenizer=tiny_tokenizer())
    same_as_dequantised(llama_folder, folder, tokens)


def test_quantize_then_save_is_the_same(llama_folder: Path, tmp_path: Path) -> None:
    tuner = AutoRound(llama_folder, group_size=32, recipe="rtn", device="cpu", compute_dtype="float32")
    with pytest.raises(OutputError, match="quantize"):
        tuner.save_quantized(tmp_path / "early")
    tuner.quantize()
    tuner.save_quantized(tmp_path / "a")
    tuner.quantize_and_save(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b"]


def test_a_pickled_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "old")
    tiny_tokenizer().save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin.*\n.*save_pretrained"):
        tune(tmp_path / "old", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"group_size": 0}, {"iters": -1}, {"lr": 0.0}, {"recipe": "worst"}])
def test_wrong_values_are_refused_before_anything_is_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=str(next(iter(wrong.values())))):
        AutoRound("/no/such/model", **wrong)


@pytest.mark.parametrize("finishing", [{}, {"finish_iters": 2, "finish_nsamples": 10}])
def test_samples_that_the_model_adds_are_behind_those_of_the_blocks(
    llama_folder: Path, tmp_path: Path, finishing: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    tuned = Runner.tune
    monkeypatch.setattr(Runner, "tune", lambda self, data: (seen.append(data.tokens), tuned(self, data))[1])
    tokenizer = tiny_tokenizer()
    rows = torch.randint(5, len(tokenizer), (10, 32), generator=torch.Generator().manual_seed(0))
    settings = {"nsamples": 8, "self_nsamples": 4, "seqlen": 32, "iters": 2, "group_size": 32, **finishing}
    run = AutoRound(llama_folder, tokenizer, dataset=rows, device="cpu", compute_dtype="float32", **settings)
    report = run.quantize_and_save(tmp_path / "out")
    assert report.calibration is not None
    assert report.calibration["samples"] == (14 if finishing else 12)
    assert report.calibration["source"] == "token ids that were given, and 4 of the model's own"
    (blocks,) = seen
    assert blocks.shape == (12, 32)
    assert blocks[:8].equal(rows[:8])
    assert not any(row.equal(given) for row in blocks[8:] for given in rows)


def test_compiled_blocks_start_from_the_same_moments(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dynamo alone, which is what leaves hooks out; inductor takes half a minute and adds nothing here.
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **rest: compiled(module, backend="eager", **rest))
    settings: dict[str, Any] = {**killing.SETTINGS, "iters": 0}
    plain = AutoRound(llama_folder, **settings).quantize_and_save(tmp_path / "plain")
    quick = AutoRound(llama_folder, enable_torch_compile=True, **settings).quantize_and_save(tmp_path / "quick")
    assert sum(stats.unreached for stats in quick.blocks) == 0
    for a, b in zip(plain.blocks, quick.blocks, strict=True):
        assert b.loss_start == pytest.approx(a.loss_start, rel=0.02)


def test_a_tokenizer_that_is_given_is_saved_with_the_result(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    mine = tiny_tokenizer()
    mine.chat_template = "{{ messages[0]['content'] }}!"
    folder = tune(tmp_path / "bare", tmp_path / "out", tokenizer=mine)
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.get_vocab() == mine.get_vocab()
    assert saved.chat_template == mine.chat_template
    tiny_tokenizer().save_pretrained(tmp_path / "bare")  # another of that name is there: the given one counts
    folder = tune(tmp_path / "bare", tmp_path / "again", tokenizer=mine)
    assert AutoTokenizer.from_pretrained(folder).chat_template == mine.chat_template
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again", "bare", "out"]


def test_saving_in_a_format_that_holds_less_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tuner = AutoRound(tmp_path / "gpt2", group_size=32, recipe="rtn", device="cpu", compute_dtype="float32")
    tuner.quantize()
    with pytest.raises(FormatError, match=r"Conv1D.*quantize"):
        tuner.save_quantized(tmp_path / "out", format="auto_awq")
    assert not (tmp_path / "out").exists()
    tuner.save_quantized(tmp_path / "out")


def test_the_size_before_is_that_of_the_tensors_once(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "m")
    shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "consolidated.safetensors")
    tuner = AutoRound(tmp_path / "m", group_size=32, recipe="rtn", device="cpu", compute_dtype="float32")
    expected = sum(tensor.nbytes for tensor in load_file(tmp_path / "m" / "model.safetensors").values())
    assert tuner.quantize_and_save(tmp_path / "out").bytes_before == tuner.plan().model_bytes == expected
