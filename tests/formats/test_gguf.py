"""GGUF files of tiny models: names, order of rows, keys, tokenizer, and refusals before any work."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tests.conftest import tiny_tokenizer
from tests.formats.gguf_models import COMMON, CONFIGS, ROWS, TEXTS, byte_tokenizer, quantised, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound
from auto_round.errors import FormatError, SpecError
from auto_round.formats import FORMATS
from auto_round.formats.gguf.architectures import Model
from auto_round.formats.gguf.reader import GgufFile, read_floats, read_layers
from auto_round.formats.gguf.vocabulary import read_vocabulary
from auto_round.load import load_qtensors
from auto_round.qtensor import from_blocks, to_blocks

DENSE = [name for name in CONFIGS if "moe" not in name and name != "mixtral"]
# Its reader drops biases of llama and takes the head's size of qwen3 from the width, whatever the file says.
READ_BY_TRANSFORMERS = ["llama3", "mistral", "qwen2", "gemma2", "gemma3", "phi3"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_model(name, tmp_path_factory.mktemp(name)) for name in DENSE}


@pytest.mark.parametrize("name", DENSE)
def test_read_back_by_our_names_the_model_is_the_one_that_was_written(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """q8_0 is near enough that every tensor in a wrong place or order would show."""
    file = quantised(sources[name], tmp_path / "out", "q8_0")
    model = AutoModelForCausalLM.from_pretrained(sources[name], dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = dict(read_floats(file))
    loaded = model.load_state_dict({key: value.float() for key, value in found.items()}, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for key, value in found.items():
        scale = before[key].abs().max()
        assert (value - before[key]).abs().max() < 0.01 * scale + 1e-6, key


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_own_reader_finds_the_same_weights(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    file = quantised(sources[name], tmp_path / "out", "q4_0")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    for key, value in read_floats(file):
        torch.testing.assert_close(theirs[key], value.float(), rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2"])
def test_transformers_reads_the_models_keys_and_its_tokenizer(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    file = quantised(sources[name], tmp_path / "out", "q8_0")
    original = AutoConfig.from_pretrained(sources[name])
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(config, key) == getattr(original, key), key
    assert config.rms_norm_eps == pytest.approx(original.rms_norm_eps)
    text = "the fox jumps over Ünïcode 123 the  end\n"
    assert (
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text, add_special_tokens=False)["input_ids"]
        == AutoTokenizer.from_pretrained(sources[name])(text, add_special_tokens=False)["input_ids"]
    )


def test_keys_say_what_made_the_file(sources: dict[str, Path], tmp_path: Path) -> None:
    file = GgufFile(quantised(sources["llama"], tmp_path / "out", "q5_1"))
    assert file.value("general.file_type") == 9
    assert file.value("general.quantization_version") == 2
    assert file.value("general.quantized_by").startswith("auto-round")
    assert file.value("auto_round.seed") == "42"
    assert file.value("tokenizer.chat_template") == "{{ messages }}"
    assert file.value("tokenizer.ggml.bos_token_id") == 256
    tokens, types = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == ROWS
    assert (tokens[-1], types[-1]) == (f"[PAD{ROWS - 1}]", int(gguf.TokenType.UNUSED))
    assert types[257] == int(gguf.TokenType.CONTROL)


def test_rope_factors_of_llama_3_are_a_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    file = GgufFile(quantised(sources["llama3"], tmp_path / "out", "q8_0"))
    model = AutoModelForCausalLM.from_pretrained(sources["llama3"])
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(file.floats("rope_freqs.weight"), plain / model.model.rotary_emb.inv_freq)


def test_a_mix_is_tuned_written_and_read_back(tmp_path: Path) -> None:
    """Rows of 256 and of 64: K types and what they give way to, tuned for some steps on their own grids."""
    source = tiny_model("llama", tmp_path / "in", hidden_size=256, intermediate_size=288, head_dim=64)
    tuner = AutoRound(
        source, iters=6, nsamples=8, seqlen=32, batch_size=4, dataset=TEXTS, device="cpu", compute_dtype="float32"
    )
    report = tuner.quantize_and_save(tmp_path / "out", format="gguf:q4_k_m")
    layers = dict(read_layers(next((tmp_path / "out").glob("*.gguf"))))
    types = {name: tensor.scheme.name for name, tensor in layers.items()}
    assert types["model.layers.0.self_attn.q_proj"] == "q4_k"
    assert types["model.layers.1.self_attn.v_proj"] == "q6_k"
    assert types["model.layers.0.mlp.down_proj"] in ("q5_0", "q8_0")
    assert types["lm_head"] == "q6_k"
    assert all(block.loss_end is not None and block.loss_end <= block.loss_start for block in report.blocks)


def test_integer_schemes_with_the_same_grid_share_their_codes(sources: dict[str, Path], tmp_path: Path) -> None:
    tuner = AutoRound(sources["qwen2"], scheme="W4A16G32", recipe="rtn", device="cpu", compute_dtype="float32")
    tuner.quantize_and_save(tmp_path / "out", format="auto_round,gguf:q4_0")
    ours = dict(load_qtensors(tmp_path / "out" / "auto_round"))
    for name, blocks in read_layers(next((tmp_path / "out" / "gguf-q4_0").glob("*.gguf"))):
        if name in ours:
            assert from_blocks(blocks).same(ours[name])
            assert to_blocks(ours[name]).same(blocks)


def test_layer_rules_name_types_or_keep(sources: dict[str, Path], tmp_path: Path) -> None:
    rules = {"*.0.mlp.up_proj": "q8_0", "*.1.mlp.down_proj": "keep"}
    file = GgufFile(quantised(sources["qwen2"], tmp_path / "out", "q4_0", layer_config=rules))
    kinds = {name: gguf.GGMLQuantizationType(t.tensor_type).name for name, t in file.tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"


def test_a_rule_in_bits_is_answered_with_the_names_of_types(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="q6_k"):
        quantised(sources["qwen2"], tmp_path / "out", "q4_0", layer_config={"*.0.mlp.up_proj": {"bits": 8}})


def test_other_grids_beside_another_format_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    tuner = AutoRound(sources["qwen2"], recipe="rtn", device="cpu")
    with pytest.raises(SpecError, match="save it alone"):
        tuner.quantize_and_save(tmp_path / "out", format="auto_round,gguf:q4_k_m")


def test_an_architecture_without_a_place_is_refused_before_any_work(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(FormatError, match="'opt'"):
        Model({"model_type": "opt"})
    with pytest.raises(FormatError, match="WordLevel"):
        quantised(llama_folder, tmp_path / "out", "q4_0", recipe="default", iters=200)
    assert not (tmp_path / "out").exists()


def test_a_pattern_of_layers_that_llama_cpp_does_not_know_is_refused() -> None:
    layers = ["full_attention"] * 6
    with pytest.raises(FormatError, match="every 6th layer"):
        Model({**COMMON, **CONFIGS["gemma3"], "layer_types": layers})


def test_tokenizers_that_split_otherwise_are_refused() -> None:
    with pytest.raises(FormatError, match="WordLevel"):
        read_vocabulary(tiny_tokenizer(), 128)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        read_vocabulary(None, 128)
    odd = byte_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(FormatError, match="splits no text"):
        read_vocabulary(odd, ROWS)


def test_large_files_are_cut_into_shards(sources: dict[str, Path], tmp_path: Path) -> None:
    AutoRound(sources["qwen2"], recipe="rtn", device="cpu").quantize_and_save(
        tmp_path / "out", format="gguf:q8_0", max_shard_size="60KB"
    )
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) > 1
    assert files[0].name.endswith(f"-00001-of-{len(files):05d}.gguf")


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_sizes_are_told_before(shard: str, sources: dict[str, Path], tmp_path: Path) -> None:
    tuner = AutoRound(sources["llama3"], recipe="rtn", device="cpu", compute_dtype="float32")
    told = tuner.plan(tmp_path / "out", format="gguf:q4_k_m", max_shard_size=shard).formats[0].files
    tuner.quantize_and_save(tmp_path / "out", format="gguf:q4_k_m", max_shard_size=shard)
    assert told == {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.gguf")}
    assert (len(told) > 1) == (shard == "60KB")


def test_every_name_of_a_file_type_is_a_format() -> None:
    assert all(FORMATS[name].name == name for name in FORMATS if name.startswith("gguf:"))
