"""A folder of codes, opened as users open it, gives what the dequantised weights give, or an error."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel

import auto_round
from auto_round.errors import AutoRoundError, BackendError, FormatError, SourceError
from auto_round.formats.config import LAYOUTS
from auto_round.inference.qlinear import QLinear
from auto_round.inference.select import choose
from auto_round.load import dequantized_state_dict, load_qtensors
from auto_round.qtensor import QTensor
from auto_round.source.blocks import linears_in
from auto_round.spec.scheme import Scheme

V1, AWQ, RAW = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
DEFAULT = Scheme(4, 64)
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def random_qtensor(out_features: int, in_features: int, scheme: Scheme, least_zero: int, seed: int) -> QTensor:
    """Codes over the whole range, scales of both signs if symmetric, zero points from `least_zero` up."""
    g = torch.Generator().manual_seed(seed)
    grid = (out_features, scheme.group_count(in_features))
    codes = torch.randint(0, scheme.max_code + 1, (out_features, in_features), dtype=torch.uint8, generator=g)
    scales = (torch.randn(grid, generator=g) * 0.1 / scheme.max_code).half()
    zeros = torch.randint(least_zero, scheme.max_code + 1, grid, dtype=torch.uint8, generator=g)
    return QTensor(codes, scales if scheme.sym else scales.abs(), None if scheme.sym else zeros, scheme)


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    scheme: Scheme = DEFAULT,
    packing: str = V1,
    others: Mapping[str, Scheme | None] | None = None,
    **config: Any,
) -> dict[str, QTensor]:
    """Save `model` with random codes for its in-block Linears and those of `others`; `model` gets their weights.

    others: name -> another scheme, or None to keep the layer. config: more keys of quantization_config, None drops one.
    """
    others = others or {}
    schemes = {name: scheme for name in linears_in(model) if name.startswith("model.layers.")} | dict(others)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layers = {}
    for seed, (name, own) in enumerate(schemes.items()):
        if own is not None:
            linear = model.get_submodule(name)
            layers[name] = random_qtensor(linear.out_features, linear.in_features, own, int(packing == V1), seed)
            linear.weight.data = layers[name].dequantize()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{k}": v for k, v in LAYOUTS[packing].encode(layers[name]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym, "packing_format": packing}
    extra = {
        name: {"bits": 16} if own is None else {"bits": own.bits, "group_size": own.group_size, "sym": own.sym}
        for name, own in others.items()
    }
    settings = {"quant_method": "auto-round", "data_type": "int", **base, "extra_config": extra, **config}
    rewrite_config(folder, {k: v for k, v in settings.items() if v is not None})
    return layers


def rewrite_config(folder: Path, quantization: dict[str, Any], **changes: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": quantization} | changes
    file.write_text(json.dumps(values))


def rewrite_tensors(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def opened(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns whenever a quantization_config is passed
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def assert_same(folder: Path, dense: nn.Module, **options: Any) -> Any:
    model = opened(folder, **options)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    return model


def tiny_qwen2() -> Qwen2ForCausalLM:
    """Biases on q, k and v, filled with values that matter."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("packing", [V1, RAW])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 64), (4, 128), (8, 64), (4, -1), (3, 32)])
def test_logits_are_those_of_the_dequantised_weights(
    tmp_path: Path, bits: int, group_size: int, packing: str, sym: bool
) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense, Scheme(bits, group_size, sym), packing)
    model = assert_same(tmp_path, dense)
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 7
    assert model.model.layers[0].mlp.down_proj.stored().tensors["qweight"].dtype is torch.int32


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("packing", [AWQ, "auto_round:awq"])
def test_awq_packing(tmp_path: Path, packing: str, sym: bool) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense, Scheme(4, 32, sym), AWQ, packing_format=packing)
    assert_same(tmp_path, dense)


@pytest.mark.parametrize(
    ("packing", "keys"),
    [
        (V1, {"packing_format": None}),
        (V1, {"packing_format": "auto"}),
        (V1, {"packing_format": "auto_round:gptq"}),
        (RAW, {"packing_format": "auto_round:gptqmodel"}),
        (RAW, {"packing_format": None, "backend": "auto_round:gptqmodel"}),
        (V1, {"packing_format": None, "backend": "auto_round:auto_gptq"}),
        (V1, {"block_name_to_quantize": "model.layers"}),
        (V1, {"to_quant_block_names": ["model.layers"]}),
        (V1, {"quant_block_list": [["model.layers.0", "model.layers.1"]]}),
        (V1, {"act_bits": 16, "rotation_config": None}),
    ],
)
def test_spellings_of_older_and_other_writers(tmp_path: Path, packing: str, keys: dict[str, Any]) -> None:
    dense = tiny_llama(num_hidden_layers=2)
    write_folder(tmp_path, dense, Scheme(4, 64, sym=False), packing, **keys)
    assert_same(tmp_path, dense)


@pytest.mark.parametrize("asked", ["auto", "torch", "auto_round:auto_gptq"])
def test_asking_for_a_backend_leaves_the_packing_that_an_old_folder_names_there(tmp_path: Path, asked: str) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    keys = {"packing_format": None, "backend": "auto_round:gptqmodel"}
    write_folder(tmp_path, dense, Scheme(4, 64, sym=False), RAW, **keys)
    model = opened(tmp_path, quantization_config=auto_round.AutoRoundConfig(backend=asked))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=1e-4)


def test_stored_g_idx_is_ignored(tmp_path: Path) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense)
    rewrite_tensors(tmp_path, {"model.layers.0.mlp.up_proj.g_idx": torch.arange(96, dtype=torch.int32) // 64})
    assert_same(tmp_path, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_dense_model(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense, Scheme(3, 64, sym=False), RAW)
    model = opened(tmp_path, dtype)
    assert model.model.layers[0].mlp.up_proj.stored().tensors["scales"].dtype is torch.float16
    assert logits(model).dtype is dtype
    torch.testing.assert_close(logits(model), logits(dense.to(dtype)), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_scales_that_a_model_class_keeps_in_float32_come_back_to_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense)
    expected = logits(opened(tmp_path, torch.bfloat16, quantization_config=AutoRoundConfig(backend=backend)))
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["scale"])
    model = opened(tmp_path, torch.bfloat16, quantization_config=AutoRoundConfig(backend=backend))
    assert model.model.layers[0].mlp.up_proj.stored().tensors["scales"].dtype is torch.float16
    assert torch.equal(logits(model), expected)
    name = "model.layers.0.mlp.up_proj.scales"
    scales = load_file(tmp_path / "model.safetensors")[name].float()
    rewrite_tensors(tmp_path, {name: scales * (1 + 2**-20)})
    with pytest.raises(FormatError, match=r"mlp\.up_proj.*scales in torch\.float32 do not fit torch\.float16 exactly"):
        opened(tmp_path, torch.bfloat16, quantization_config=AutoRoundConfig(backend=backend))


def test_mixed_bits_a_kept_layer_and_a_quantised_head(tmp_path: Path) -> None:
    dense = tiny_llama()
    others = {
        "model.layers.0.mlp.down_proj": None,
        "model.layers.1.self_attn.q_proj": Scheme(8, 32),
        "model.layers.1.mlp.up_proj": Scheme(2, 64, sym=False),
        "lm_head": Scheme(4, 32),
    }
    write_folder(tmp_path, dense, others=others)
    model = assert_same(tmp_path, dense)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.model.layers[1].self_attn.q_proj.scheme == Scheme(8, 32)
    assert model.lm_head.scheme == Scheme(4, 32)


def test_patterns_apply_where_no_exact_name_does(tmp_path: Path) -> None:
    dense = tiny_llama()
    down = {f"model.layers.{i}.mlp.down_proj": Scheme(8, 32) for i in range(2)}
    write_folder(
        tmp_path,
        dense,
        others={**down, "model.layers.1.mlp.down_proj": None},
        extra_config={r"mlp\.down": {"bits": 8, "group_size": 32}, "model.layers.1.mlp.down_proj": {"bits": 16}},
    )
    assert_same(tmp_path, dense)


def test_biases_in_another_dtype_than_the_model(tmp_path: Path) -> None:
    dense = tiny_qwen2()
    write_folder(tmp_path, dense)
    biases = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k.endswith("bias")}
    assert len(biases) == 3
    for name, value in biases.items():
        half = value.half()
        rewrite_tensors(tmp_path, {name: half})
        dense.get_parameter(name).data = half.float()
    assert_same(tmp_path, dense)


@pytest.mark.parametrize(("packing", "scheme"), [(V1, Scheme(3, 64)), (AWQ, Scheme(4, 32, sym=False))])
def test_a_loaded_model_saves_and_loads_again(tmp_path: Path, packing: str, scheme: Scheme) -> None:
    dense = tiny_llama()
    layers = write_folder(tmp_path / "first", dense, scheme, packing, others={"model.layers.0.mlp.up_proj": None})
    opened(tmp_path / "first", torch.bfloat16).save_pretrained(tmp_path / "second")
    again = dict(load_qtensors(tmp_path / "second"))
    assert again.keys() == layers.keys()
    assert all(again[name].same(layers[name]) for name in layers)
    reloaded = opened(tmp_path / "second")
    torch.testing.assert_close(logits(reloaded), logits(dense), atol=2e-2, rtol=2e-2)  # embeddings went through bf16


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_an_error(tmp_path: Path, tensor: str) -> None:
    write_folder(tmp_path, tiny_llama())
    rewrite_tensors(tmp_path, {f"model.layers.1.mlp.up_proj.{tensor}": None})
    with pytest.raises(FormatError, match=rf"1 tensors .*model\.layers\.1\.mlp\.up_proj\.{tensor}'"):
        opened(tmp_path)


def test_a_missing_bias_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_qwen2())
    rewrite_tensors(tmp_path, {"model.layers.0.self_attn.q_proj.bias": None})
    with pytest.raises(FormatError, match=r"self_attn\.q_proj\.bias"):
        opened(tmp_path)


def test_codes_of_a_layer_that_the_config_keeps_are_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    write_folder(tmp_path, tiny_llama(), extra_config={name: {"bits": 16}})
    with pytest.raises(FormatError, match=rf"1 tensors .*{name}\.weight"):
        opened(tmp_path)
    with pytest.raises(FormatError, match=rf"{name}.*kept"):
        dict(load_qtensors(tmp_path))


def test_a_missing_norm_in_a_block_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama())
    rewrite_tensors(tmp_path, {"model.layers.0.input_layernorm.weight": None})
    with pytest.raises(FormatError, match=r"input_layernorm\.weight"):
        opened(tmp_path)


def test_initialisation_leaves_quantised_layers_and_their_parents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several architectures initialise a child's weight through its parent; a QLinear has none."""
    dense = tiny_llama()
    write_folder(tmp_path, dense)
    original = LlamaPreTrainedModel._init_weights

    def touchy(self: nn.Module, module: nn.Module) -> None:
        original(self, module)
        if isinstance(module, LlamaAttention):
            nn.init.zeros_(module.q_proj.weight)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", touchy)
    assert_same(tmp_path, dense)


def test_a_model_spread_over_cpu_and_disk_runs(tmp_path: Path) -> None:
    dense = tiny_qwen2()
    write_folder(tmp_path, dense)
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={**spread, "lm_head": "cpu"}, dtype=torch.float32, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[0].self_attn.q_proj.bias.is_meta
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, FormatError, "packing_format 'auto_round:llm_compressor'"),
        ({"data_type": "mx_fp"}, FormatError, "data_type 'mx_fp'"),
        ({"act_bits": 8}, FormatError, "act_bits=8"),
        ({"desc_act": True}, FormatError, r"14 tensors .*g_idx"),
        ({"packing_format": AWQ, "bits": 3}, FormatError, r"model\.layers\.0\.self_attn\.q_proj.*AWQ holds 4 bits"),
        ({"block_name_to_quantize": "transformer.h"}, FormatError, r"none of the 15 Linear.*transformer\.h"),
        ({"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 6}}}, FormatError, "up_proj.*bits=6"),
        ({"extra_config": {"*bad": {"bits": 8}}}, FormatError, r"\*bad"),
        ({"backend": "exllamav2"}, BackendError, "exllamav2: it runs on CUDA devices, not on cpu; use native"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_folder(tmp_path, tiny_llama(), **keys)
    with pytest.raises(error, match=message):
        opened(tmp_path)


def test_shapes_that_the_config_does_not_fit_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama(), group_size=32)
    with pytest.raises((RuntimeError, FormatError), match=r"ignore_mismatched_sizes|have other shapes"):
        opened(tmp_path)  # newer versions of transformers check themselves
    with pytest.raises(FormatError, match=r"28 tensors .*have other shapes.*qzeros"):
        opened(tmp_path, ignore_mismatched_sizes=True)


def test_a_quantised_head_with_tied_embeddings_is_refused(tmp_path: Path) -> None:
    dense = tiny_llama()
    write_folder(tmp_path, dense, others={"lm_head": Scheme(4, 32)})
    config = json.loads((tmp_path / "config.json").read_text())
    rewrite_config(tmp_path, config["quantization_config"], tie_word_embeddings=True)
    with pytest.raises(FormatError, match=r"lm_head.*tie_word_embeddings"):
        opened(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    write_folder(tmp_path, tiny_llama())
    name = "model.layers.0.mlp.up_proj.scales"
    scales = load_file(tmp_path / "model.safetensors")[name].float()
    scales[0, 0] = bad
    rewrite_tensors(tmp_path, {name: scales})
    with pytest.raises(FormatError, match=r"mlp\.up_proj.*scales"):
        opened(tmp_path)


def test_asymmetric_zero_points_under_a_symmetric_config_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama(), Scheme(4, 64, sym=False), V1, sym=True)
    with pytest.raises(FormatError, match=r"layer 'model\.layers\.0.*zero points"):
        opened(tmp_path)


@pytest.mark.parametrize("backend", ["auto", "torch", "torch_reference", "auto_round:torch_zp", "ipex"])
def test_backends_by_the_names_users_know(tmp_path: Path, backend: str) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path, dense)
    model = assert_same(tmp_path, dense, quantization_config=AutoRoundConfig(backend=backend))
    assert model.config.quantization_config.group_size == 64


def test_a_backend_that_does_not_exist(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama(num_hidden_layers=1))
    with pytest.raises(BackendError, match=r"unknown backend 'torhc'\. Did you mean torch"):
        opened(tmp_path, quantization_config=AutoRoundConfig(backend="torhc"))


def foreign_folders(folder: Path) -> dict[Path, nn.Module]:
    """Write a GPTQ and an AWQ folder, each with a layer that is kept; return them with their dense models."""
    gptq = tiny_llama(num_hidden_layers=1)
    rule = {r"+:.*mlp\.down_proj": {"bits": 8, "group_size": 32}, r"-:.*k_proj": {}}
    others = {"model.layers.0.mlp.down_proj": Scheme(8, 32), "model.layers.0.self_attn.k_proj": None}
    write_folder(
        folder / "gptq",
        gptq,
        others=others,
        quant_method="gptq",
        packing_format=None,
        extra_config=None,
        dynamic=rule,
    )
    awq = tiny_llama(num_hidden_layers=1)
    write_folder(
        folder / "awq",
        awq,
        Scheme(4, 32, sym=False),
        AWQ,
        others={"model.layers.0.mlp.up_proj": None},
        quant_method="awq",
        packing_format=None,
        extra_config=None,
        sym=None,
        zero_point=True,
        version="gemm",
        modules_to_not_convert=["lm_head", "up_proj"],
    )
    return {folder / "gptq": gptq, folder / "awq": awq}


def test_gptq_and_awq_folders_of_others_are_read_as_ours(tmp_path: Path) -> None:
    for folder, dense in foreign_folders(tmp_path).items():
        assert_same(folder, dense, quantization_config=AutoRoundConfig())


def test_folders_of_others_are_saved_with_their_kept_layers_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.inference.dense.LEAST_WEIGHTS", 1)
    for folder in foreign_folders(tmp_path):
        model = opened(folder, torch.bfloat16, quantization_config=AutoRoundConfig())
        model.save_pretrained(tmp_path / "again" / folder.name)
        again = opened(tmp_path / "again" / folder.name, torch.bfloat16)
        assert torch.equal(logits(again), logits(model))


def test_kept_experts_are_named_when_a_folder_of_others_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=VOCABULARY,
    )
    keys: dict[str, Any] = {"quant_method": "gptq", "packing_format": None, "extra_config": None}
    write_folder(tmp_path / "gptq", MixtralForCausalLM(config), **keys, dynamic={"-:.*experts": {}})
    model = opened(tmp_path / "gptq", quantization_config=AutoRoundConfig())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(
    ("packing", "keys", "written"),
    [
        (V1, {}, V1),
        (RAW, {"packing_format": None, "backend": "auto_round:gptqmodel"}, "auto_round:gptqmodel"),
        (V1, {"packing_format": None, "backend": "torch"}, "auto_round:gptq"),
    ],
)
def test_the_backend_of_a_load_is_not_saved(tmp_path: Path, packing: str, keys: dict[str, Any], written: str) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    write_folder(tmp_path / "first", dense, Scheme(4, 64, sym=False), packing, **keys)
    asked = {} if "backend" in keys else {"quantization_config": AutoRoundConfig(backend="torch")}
    opened(tmp_path / "first", **asked).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (saved["backend"], saved["packing_format"]) == ("auto", written)
    assert_same(tmp_path / "again", dense)


def test_the_choice_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, tiny_llama())
    with caplog.at_level(logging.INFO, "auto_round"):
        opened(tmp_path)
    best = choose("auto", "any", DEFAULT, (96, 96), torch.float32, torch.device("cpu")).name
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith(f"14 layers W4A16G64 with {best} on cpu")


@pytest.mark.parametrize(
    ("packing", "scheme"), [(V1, Scheme(3, 64)), (RAW, Scheme(2, 128, False)), (AWQ, Scheme(4, 32))]
)
def test_reading_without_transformers(tmp_path: Path, packing: str, scheme: Scheme) -> None:
    dense = tiny_llama()
    others = {"model.layers.0.mlp.up_proj": None} | ({} if packing == AWQ else {"lm_head": Scheme(8, 32)})
    layers = write_folder(tmp_path, dense, scheme, packing, others=others)
    read = dict(load_qtensors(tmp_path))
    assert read.keys() == layers.keys()
    assert all(read[name].same(layers[name]) for name in layers)
    fresh = tiny_llama()
    fresh.load_state_dict(dequantized_state_dict(tmp_path), strict=True)
    assert torch.equal(logits(fresh), logits(dense))


def test_reading_without_transformers_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        list(load_qtensors(tmp_path))
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="not quantised"):
        list(load_qtensors(tmp_path))
    write_folder(tmp_path, tiny_llama(), group_size=32)
    with pytest.raises(AutoRoundError, match="the config does not fit"):
        list(load_qtensors(tmp_path))
