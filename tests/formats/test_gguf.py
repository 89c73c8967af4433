"""GGUF files of tiny models: names, order of rows, keys, tokenizer, and refusals before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_tokenizer
from tests.formats.gguf_models import (
    COMMON,
    CONFIGS,
    ROWS,
    TEXTS,
    byte_tokenizer,
    character_tokenizer,
    quantised,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from auto_round import AutoRound
from auto_round.conversion import convert
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


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_a_head_with_values_of_its_own_is_written_whatever_the_config_says(apart: float, tmp_path: Path) -> None:
    source = tiny_model("llama3", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + apart}, source / "model.safetensors", {"format": "pt"})
    tuner = AutoRound(source, recipe="rtn", device="cpu", compute_dtype="float32")
    told = tuner.plan(tmp_path / "out", format="gguf:q4_0").formats[0].files
    tuner.quantize_and_save(tmp_path / "out", format="gguf:q4_0")
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert told == {path.name: path.stat().st_size}
    file = GgufFile(path)
    if apart:
        assert torch.equal(file.floats("output.weight"), embedding + apart)
    else:
        assert "output.weight" not in file.tensors
    kind = gguf.GGMLQuantizationType(file.tensors["token_embd.weight"].tensor_type).name
    assert kind == ("Q4_0" if apart else "Q8_0")


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


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@pytest.mark.parametrize("between", ["auto_round", "auto_gptq"])
def test_a_folder_converted_is_the_file_that_one_run_writes(
    name: str, between: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Permuted rows, a head with codes in place of the embedding's weight, kept layers, biases."""
    rules = {"*.0.mlp.down_proj": "keep"}
    settings = {"recipe": "rtn", "device": "cpu", "compute_dtype": "float32", "layer_config": rules}
    tuner = AutoRound(sources[name], scheme="W4A16G32", quant_lm_head=True, **settings)
    tuner.quantize_and_save(tmp_path / "out", format=f"{between},gguf:q4_0")
    done = convert(tmp_path / "out" / between, tmp_path / "converted", "gguf:q4_0")
    assert not done.losses
    direct, converted = (next((tmp_path / folder).glob("*.gguf")) for folder in ("out/gguf-q4_0", "converted"))
    assert converted.name == f"{between}-Q4_0.gguf"
    assert same_tensors(direct, converted)
    one, other = GgufFile(direct), GgufFile(converted)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template", "auto_round.seed"):
        assert one.value(key) == other.value(key)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, byte for byte and in the same order."""
    found = [
        [(name, tensor.tensor_type, tensor.data.tobytes()) for name, tensor in GgufFile(file).tensors.items()]
        for file in (one, other)
    ]
    return found[0] == found[1]


def test_experts_converted_are_the_stacks_that_one_run_writes(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "in")
    tuner = AutoRound(source, scheme="W4A16G32", recipe="rtn", device="cpu", compute_dtype="float32")
    tuner.quantize_and_save(tmp_path / "out", format="auto_round,gguf:q4_0")
    convert(tmp_path / "out" / "auto_round", tmp_path / "converted", "gguf:q4_0")
    assert same_tensors(*(next((tmp_path / place).glob("*.gguf")) for place in ("out/gguf-q4_0", "converted")))


def test_conversions_that_a_file_cannot_hold_are_refused_before_rounding(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"recipe": "rtn", "device": "cpu", "compute_dtype": "float32"}
    AutoRound(sources["qwen2"], scheme="W4A16G32", **settings).quantize_and_save(tmp_path / "g32")
    AutoRound(sources["qwen2"], scheme="W4A16G64", **settings).quantize_and_save(tmp_path / "g64")
    monkeypatch.setattr("auto_round.conversion._round", lambda *_: pytest.fail("rounded"))
    for kind in ("q4_k_m", "q8_0"):
        with pytest.raises(FormatError, match=rf"{kind} cannot be made from W4A16G32.*choose gguf:q4_0"):
            convert(tmp_path / "g32", tmp_path / "no", f"gguf:{kind}")
    with pytest.raises(FormatError, match="not that of W4A16G64"):
        convert(tmp_path / "g64", tmp_path / "no", "gguf:q4_0")
    with pytest.raises(FormatError, match="cannot be rounded again to W2A16G32"):
        convert(tmp_path / "g64", tmp_path / "no", "gguf:q4_0", requantize=True, scheme="W2A16G32")
    (tmp_path / "g64" / "tokenizer.json").unlink()
    (tmp_path / "g64" / "tokenizer_config.json").unlink()
    with pytest.raises(FormatError, match="needs the model's tokenizer"):
        convert(tmp_path / "g64", tmp_path / "no", "gguf:q4_0", requantize=True)


def test_a_file_in_the_same_grid_is_not_carried_to_another(sources: dict[str, Path], tmp_path: Path) -> None:
    """Its embedding would be rounded again."""
    file = quantised(sources["qwen2"], tmp_path / "out", "q4_0")
    with pytest.raises(FormatError, match="not carried from file to file"):
        convert(file, tmp_path / "no", "gguf:q4_0")


@pytest.mark.parametrize("kept", ["*.experts.1.up_proj", "*.experts.1.*"])
def test_a_stack_of_which_some_experts_are_kept_is_refused_before_any_work(kept: str, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "in")
    tuner = AutoRound(source, device="cpu", layer_config={kept: "keep"})
    for format in ("gguf:q4_0", "gguf:q4_k_m"):
        with pytest.raises(FormatError, match=r"experts are kept, q(4_0|8_0|5_0).*keep them all"):
            tuner.plan(tmp_path / "out", format=format)
        with pytest.raises(FormatError, match=r"one tensor of one type"):
            tuner.quantize(format=format)


def test_a_stack_that_is_kept_stays_in_its_16_bit_floats(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    file = quantised(source, tmp_path / "out", "q4_0", layer_config={r"*.0.mlp.experts.*": "keep"})
    kinds = {name: gguf.GGMLQuantizationType(t.tensor_type).name for name, t in GgufFile(file).tensors.items()}
    assert (kinds["blk.0.ffn_up_exps.weight"], kinds["blk.1.ffn_up_exps.weight"]) == ("BF16", "Q4_0")
    written = GgufFile(file).floats("blk.0.ffn_down_exps.weight")
    assert torch.equal(written, model.state_dict()["model.layers.0.mlp.experts.down_proj"])


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


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, r"norm_topk_prob=True only, this model has False"),
        ("qwen2_moe", {"norm_topk_prob": True}, r"norm_topk_prob=False only"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[\] only"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=1 only"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=False only"),
        ("qwen2", {"rope_parameters": {**YARN, "beta_fast": 16}}, r"rope_parameters\.beta_fast=32 only"),
        ("llama", {"rope_parameters": {**YARN, "beta_slow": 2}}, "beta_slow=1 only"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=True only"),
    ],
)
def test_what_llama_cpp_computes_in_one_way_only_is_refused(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        Model({**COMMON, **CONFIGS[name], **changes})
    Model({**COMMON, **CONFIGS[name], **({"rope_parameters": YARN} if "rope_parameters" in changes else {})})


@pytest.mark.parametrize("given", [{"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {}])
def test_the_attention_factor_of_yarn_is_told_over_llama_cpp_s_own(given: dict[str, float], tmp_path: Path) -> None:
    source = tiny_model("qwen2", tmp_path / "in", rope_parameters={**YARN, **given})
    _, whole = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(source), torch.device("cpu"))
    own = 0.1 * math.log(4.0) + 1
    told = GgufFile(quantised(source, tmp_path / "out", "q8_0")).value("qwen2.rope.scaling.attn_factor")
    assert (told is None) == (not given)
    assert own * (told or 1) == pytest.approx(whole)


def test_tokenizers_that_split_otherwise_are_refused() -> None:
    with pytest.raises(FormatError, match="WordLevel"):
        read_vocabulary(tiny_tokenizer(), 128)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        read_vocabulary(None, 128)
    odd = byte_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(FormatError, match="splits no text"):
        read_vocabulary(odd, ROWS)


def test_added_runs_of_spaces_are_spaces_where_characters_are_merged() -> None:
    """Bare in tokens that llama.cpp looks for in the text itself; special tokens, and other vocabularies, stay."""
    tokenizer = character_tokenizer()
    found = read_vocabulary(tokenizer, ROWS)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    defined = {text for text, kind in kinds.items() if kind == gguf.TokenType.USER_DEFINED}
    assert defined == {"  ", "   ", "<u >"}
    assert kinds["<|\u2581|>"] == gguf.TokenType.CONTROL
    assert kinds["\u2581"] == kinds["\u2581a"] == gguf.TokenType.NORMAL
    assert found.tokens.index("  ") == tokenizer.convert_tokens_to_ids("\u2581\u2581")
    plain = byte_tokenizer()
    plain.add_tokens(["\u2581\u2581"])
    assert "\u2581\u2581" in read_vocabulary(plain, ROWS).tokens


def test_large_files_are_cut_into_shards(sources: dict[str, Path], tmp_path: Path) -> None:
    AutoRound(sources["qwen2"], recipe="rtn", device="cpu").quantize_and_save(
        tmp_path / "out", format="gguf:q8_0", max_shard_size="60KB"
    )
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) > 1
    assert files[0].name.endswith(f"-00001-of-{len(files):05d}.gguf")


def test_without_a_size_of_shards_gguf_is_one_file(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model above the usual size of a shard is split in safetensors alone: few readers of GGUF open several files."""
    monkeypatch.setattr("auto_round.formats.shards.LARGEST", 60_000)
    tuner = AutoRound(sources["qwen2"], scheme="W4A16G32", recipe="rtn", device="cpu", compute_dtype="float32")
    told = tuner.plan(tmp_path / "out", format="auto_round,gguf:q4_0").formats
    tuner.quantize_and_save(tmp_path / "out", format="auto_round,gguf:q4_0")
    convert(tmp_path / "out" / "auto_round", tmp_path / "converted", "gguf:q4_0")
    (file,) = (tmp_path / "out" / "gguf-q4_0").glob("*.gguf")
    assert file.stat().st_size > 60_000
    assert same_tensors(file, *(tmp_path / "converted").glob("*.gguf"))
    assert [len(form.files) for form in told] == [len(list((tmp_path / "out" / "auto_round").glob("model*"))), 1]
    assert len(told[0].files) > 2


@pytest.mark.parametrize("shard", [None, "5GB", "60KB"])
def test_sizes_are_told_before(shard: str | None, sources: dict[str, Path], tmp_path: Path) -> None:
    tuner = AutoRound(sources["llama3"], recipe="rtn", device="cpu", compute_dtype="float32")
    told = tuner.plan(tmp_path / "out", format="gguf:q4_k_m", max_shard_size=shard).formats[0].files
    tuner.quantize_and_save(tmp_path / "out", format="gguf:q4_k_m", max_shard_size=shard)
    assert told == {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.gguf")}
    assert (len(told) > 1) == (shard == "60KB")


def test_every_name_of_a_file_type_is_a_format() -> None:
    assert all(FORMATS[name].name == name for name in FORMATS if name.startswith("gguf:"))
