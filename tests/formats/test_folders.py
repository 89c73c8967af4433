"""Every format written from one run, converted into the others, opened again, and refused when damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import VOCABULARY, tiny_llama
from tests.formats.coded import CODED, codes, quantised, reconfigure, rewrite, same_codes, with_act_order
from transformers import AutoModel, AutoModelForCausalLM, AutoRoundConfig

from auto_round import AutoRound
from auto_round.conversion import convert
from auto_round.errors import AutoRoundError, FormatError, OutputError, SourceError, SpecError
from auto_round.formats import FORMATS
from auto_round.formats.gptq import SERVED_AS
from auto_round.load import dequantized_state_dict
from auto_round.report.inspection import inspect
from auto_round.spec.fusions import MERGED
from auto_round.spec.plan import LayerPlan, Plan
from auto_round.spec.scheme import Scheme

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sym(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subfolders: the same symmetric codes in every format; read-only."""
    return quantised(llama_folder, tmp_path_factory.mktemp("sym") / "all", ",".join([*CODED, "fake"]))


@pytest.fixture(scope="module")
def asym(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with zero points, some of which are 0: block 1's weights are made positive."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(UP).weight.abs_()
    source = tmp_path_factory.mktemp("positive")
    model.save_pretrained(source)
    folder = quantised(source, tmp_path_factory.mktemp("asym") / "all", ",".join(CODED), sym=False)
    assert bool((codes(folder / "auto_round")[UP].zero_points() == 0).all())
    return folder


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def dense(folder: Path) -> Any:
    """The source's architecture with the weights that a folder's codes stand for."""
    model = tiny_llama()
    model.load_state_dict(dequantized_state_dict(folder))
    return model


def as_ours(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=AutoRoundConfig(), **options
    )


@pytest.mark.parametrize("format", CODED)
def test_one_run_writes_the_same_codes_in_every_format(sym: Path, asym: Path, format: str) -> None:
    for folder in (sym, asym):
        assert same_codes(folder / format, folder / "auto_round")
        found = inspect(folder / format)
        assert (found.format, len(found.layers), found.problems) == (format, 14, ())
        assert found.layers[0].kind == ("W4A16G32" if folder is sym else "W4A16G32 asym")


def test_fake_is_the_dequantised_model_in_the_source_s_dtype(sym: Path, llama_folder: Path) -> None:
    weights, source = load_file(sym / "fake" / "model.safetensors"), load_file(llama_folder / "model.safetensors")
    assert weights.keys() == source.keys()
    expected = dequantized_state_dict(sym / "auto_round")
    assert all(torch.equal(weights[name], expected[name].to(source[name].dtype)) for name in weights)
    assert "quantization_config" not in json.loads((sym / "fake" / "config.json").read_text())
    with pytest.raises(FormatError, match="not quantised"):
        inspect(sym / "fake")


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_a_chain_of_conversions_returns_the_same_bytes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(kind) / "auto_round"
    here = start
    for i, format in enumerate(("auto_gptq", "gptq_v2", "auto_awq", "llm_compressor", "auto_round")):
        done = convert(here, tmp_path / str(i), format)
        assert (done.layers, done.losses, done.error) == (14, (), 0.0)
        here = Path(done.folder)
    assert same_codes(here, start)
    before, after = (load_file(f / "model.safetensors") for f in (start, here))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, last = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (start, here))
    assert last.pop("converted_from") == "llm_compressor"
    assert last == first


@pytest.mark.parametrize("format", ["auto_gptq", "gptq_v2", "auto_awq"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_folders_of_others_are_opened_as_ours_and_saved_as_ours(
    kind: str, format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind) / format
    model = as_ours(folder)
    torch.testing.assert_close(logits(model), logits(dense(folder)), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "auto-round"
    assert not {"checkpoint_format", "desc_act", "zero_point", "version", "modules_to_not_convert"} & set(written)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, device_map="cpu")
    assert torch.equal(logits(plain), logits(model))
    read = codes(tmp_path / "again")
    expected = codes(folder)
    assert all(torch.equal(read[name].dequantize(), expected[name].dequantize()) for name in expected)


@pytest.mark.parametrize("format", ["auto_gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_act_order_is_opened_saved_converted_and_refused(
    kind: str, format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = copy(request.getfixturevalue(kind) / format, tmp_path)
    weights = with_act_order(folder)
    expected = dense(folder)
    for name, weight in weights.items():
        assert torch.equal(expected.get_submodule(name).weight, weight)
    model = as_ours(folder)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert same_codes(tmp_path / "again", folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, device_map="cpu")
    assert torch.equal(logits(again), logits(model))

    other = "gptq_v2" if format == "auto_gptq" else "auto_gptq"
    convert(folder, tmp_path / "other", other)
    assert same_codes(tmp_path / "other", folder)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    convert(folder, tmp_path / "floats", "fake")
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    assert all(torch.equal(floats[f"{name}.weight"], weight) for name, weight in weights.items())
    with pytest.raises(FormatError, match=r"auto_awq cannot hold 14 of 14 .*act-order.*--format auto_gptq is exact"):
        convert(folder, tmp_path / "awq", "auto_awq")
    assert not (tmp_path / "awq").exists()


def test_a_g_idx_that_changes_nothing_is_dropped_also_under_desc_act(sym: Path, tmp_path: Path) -> None:
    folder = copy(sym / "auto_gptq", tmp_path)
    reconfigure(folder, desc_act=True, static_groups=True)
    model = as_ours(folder)
    torch.testing.assert_close(logits(model), logits(dense(folder)), atol=1e-5, rtol=1e-5)
    assert "model.layers.0.mlp.up_proj.order" not in dict(model.named_buffers())
    convert(folder, tmp_path / "out", "auto_round")
    assert same_codes(tmp_path / "out", sym / "auto_round")


def test_gptqmodel_s_meta_is_no_hindrance_to_conversion(sym: Path, tmp_path: Path) -> None:
    folder = copy(sym / "auto_gptq", tmp_path)
    reconfigure(folder, meta={"quantizer": ["gptqmodel:7.7.0"]})
    with pytest.raises(NotImplementedError):
        as_ours(folder)
    assert "meta" in str(inspect(folder, check=False).clients["transformers with this package"])
    convert(folder, tmp_path / "out", "auto_round")
    assert same_codes(tmp_path / "out", sym / "auto_round")


@pytest.mark.parametrize(
    ("format", "changes", "side_file"),
    [
        ("auto_round", {"packing_format": None, "backend": "auto_round:gptq"}, None),
        ("auto_round", {"packing_format": "auto_round:gptq"}, None),
        (
            "auto_round",
            {"quant_method": "intel/auto-round", "packing_format": None, "backend": "auto_round:auto_gptq"},
            None,
        ),
        ("auto_gptq", {"bits": None, "wbits": 4, "checkpoint_format": None}, None),
        ("auto_gptq", {"checkpoint_format": None, "quant_method": None}, "quantize_config.json"),
        (
            "auto_awq",
            {"bits": None, "group_size": None, "w_bit": 4, "q_group_size": 32, "quant_method": None},
            "quant_config.json",
        ),
        ("auto_awq", {"zero_point": False}, None),
    ],
)
def test_folders_of_every_age_open(
    sym: Path, tmp_path: Path, format: str, changes: dict[str, Any], side_file: str | None
) -> None:
    folder = copy(sym / format, tmp_path)
    reconfigure(folder, **changes)
    for name in ("quantize_config.json", "quantization_config.json"):
        (folder / name).unlink(missing_ok=True)
    if side_file:
        config = json.loads((folder / "config.json").read_text())
        (folder / side_file).write_text(json.dumps(config.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(config))
    assert same_codes(folder, sym / "auto_round")


MIXED = {
    "*.down_proj": {"bits": 8},
    "model.layers.0.self_attn.k_proj": "keep",
    "model.layers.1.*.up_proj": {"sym": False},
}


@pytest.mark.parametrize("format", ["auto_gptq", "gptq_v2", "llm_compressor"])
def test_mixed_bits_kept_layers_and_a_quantised_head(llama_folder: Path, tmp_path: Path, format: str) -> None:
    folder = quantised(llama_folder, tmp_path / "out", f"auto_round,{format}", layer_config=MIXED, quant_lm_head=True)
    assert same_codes(folder / format, folder / "auto_round")
    read = codes(folder / format)
    assert {name.rpartition(".")[2]: t.scheme.bits for name, t in read.items()}["down_proj"] == 8
    assert "lm_head" in read
    assert "model.layers.0.self_attn.k_proj" not in read
    found = inspect(folder / format)
    assert found.kept == ("model.layers.0.self_attn.k_proj",)
    assert found.problems == ()
    assert "loaded as one matrix" in str(found.clients["vLLM"])
    if format != "llm_compressor":
        model = as_ours(folder / format)
        torch.testing.assert_close(logits(model), logits(dense(folder / format)), atol=1e-5, rtol=1e-5)
    convert(folder / format, tmp_path / "back", "auto_round")
    assert same_codes(tmp_path / "back", folder / "auto_round")


@pytest.mark.parametrize("format", ["auto_round", "auto_gptq", "auto_awq"])
def test_the_bare_model_opens_as_embedding_models_are(sym: Path, format: str) -> None:
    bare, whole = (
        opener.from_pretrained(
            sym / format, quantization_config=AutoRoundConfig(), dtype=torch.float32, device_map="cpu"
        )
        for opener in (AutoModel, AutoModelForCausalLM)
    )
    with torch.no_grad():
        found, expected = bare(IDS).last_hidden_state, whole.model(IDS).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert type(bare.layers[0].mlp.up_proj) is not torch.nn.Linear


def test_a_pattern_among_targets_goes_before_a_class(llama_folder: Path, tmp_path: Path) -> None:
    rules = {"*.down_proj": {"bits": 8}}
    folder = quantised(llama_folder, tmp_path / "out", "auto_round,llm_compressor", layer_config=rules)
    file = folder / "llm_compressor" / "config.json"
    config = json.loads(file.read_text())
    groups = config["quantization_config"]["config_groups"]
    for group in groups.values():
        group["targets"] = ["Linear"] if group["weights"]["num_bits"] == 4 else ["re:.*down_proj"]
    four = next(name for name, group in groups.items() if group["targets"] == ["Linear"])
    config["quantization_config"]["config_groups"] = {four: groups[four], **groups}
    file.write_text(json.dumps(config))
    assert same_codes(folder / "llm_compressor", folder / "auto_round")


def test_a_layer_kept_in_every_block_is_said_in_transformers_way_too(llama_folder: Path, tmp_path: Path) -> None:
    folder = quantised(llama_folder, tmp_path / "out", "auto_gptq", layer_config={"*.k_proj": "keep"})
    settings = json.loads((folder / "quantize_config.json").read_text())
    (inner,) = settings["modules_in_block_to_quantize"]
    assert len(inner) == 6
    assert "self_attn.k_proj" not in inner
    assert settings["dynamic"] == {rf"-:^model\.layers\.{i}\.self_attn\.k_proj$": {} for i in range(2)}


def test_a_quantised_head_is_not_left_out_by_the_names_in_blocks(llama_folder: Path, tmp_path: Path) -> None:
    """A server that finds modules_in_block_to_quantize takes everything else for floats."""
    rules = {"*.k_proj": "keep"}
    folder = quantised(llama_folder, tmp_path / "out", "auto_gptq", layer_config=rules, quant_lm_head=True)
    settings = json.loads((folder / "quantize_config.json").read_text())
    assert settings["lm_head"] is True
    assert "modules_in_block_to_quantize" not in settings
    assert "lm_head" in codes(folder)
    assert inspect(folder).kept == tuple(f"model.layers.{i}.self_attn.k_proj" for i in range(2))


def served(settings: dict[str, Any], name: str) -> Any:
    """What vLLM and SGLang find for a module: values, False for one that is kept, None for the rest."""
    for key, values in settings.get("dynamic", {}).items():
        if re.match(key[2:], name):
            return values if key.startswith("+") else False
    return None


def test_matrices_that_servers_merge_have_entries_of_their_own(llama_folder: Path, tmp_path: Path) -> None:
    rules = {"*.0.*.[qkv]_proj": {"bits": 8}, "*.1.*.[qk]_proj": {"bits": 8}, "*.1.*.gate_proj": "keep"}
    rules |= {"*.1.*.up_proj": "keep", "*.0.*.down_proj": {"bits": 8}}
    folder = quantised(llama_folder, tmp_path / "out", "auto_gptq", layer_config=rules)
    settings = json.loads((folder / "quantize_config.json").read_text())
    eight = {"bits": 8, "group_size": 32, "sym": True}
    assert served(settings, "model.layers.0.self_attn.qkv_proj") == eight
    assert served(settings, "model.layers.1.self_attn.qkv_proj") is None  # they differ, see `broken_fusions`
    assert served(settings, "model.layers.0.mlp.gate_up_proj") is None
    assert served(settings, "model.layers.1.mlp.gate_up_proj") is False
    assert sum("qkv_proj" in key for key in settings["dynamic"]) == 1
    assert codes(folder)["model.layers.0.self_attn.k_proj"].scheme.bits == 8
    assert set(SERVED_AS) <= set(MERGED)


def test_experts_have_an_entry_for_all_of_a_layer() -> None:
    def plan(*second: Scheme | None) -> Plan:
        first = [LayerPlan(f"model.layers.0.mlp.experts.{i}.up_proj", 64, 64, Scheme(8, 32), "") for i in range(2)]
        other = [LayerPlan(f"model.layers.1.mlp.experts.{i}.up_proj", 64, 64, s, "") for i, s in enumerate(second)]
        return Plan(Scheme(4, 32), (*first, *other), ("model.layers",))

    for second, expected in (((None, None), False), ((None, Scheme(4, 32)), None), ((Scheme(4, 32),) * 2, None)):
        settings = FORMATS["auto_gptq"].settings(plan(*second))
        assert served(dict(settings), "model.layers.0.mlp.experts") == {"bits": 8, "group_size": 32, "sym": True}
        assert served(dict(settings), "model.layers.1.mlp.experts") is expected


@pytest.mark.parametrize(
    ("settings", "format", "error", "message"),
    [
        ({"layer_config": {"*.down_proj": {"group_size": 16}}}, "auto_awq", FormatError, "one scheme .*G32 in 12"),
        ({"quant_lm_head": True}, "auto_awq", FormatError, "'lm_head'.*quant_lm_head"),
        ({"bits": 3}, "auto_awq", SpecError, "AWQ holds 4 bits only, not 3"),
        ({"bits": 2}, "llm_compressor", SpecError, "4 or 8 bits, not 2"),
        ({"group_size": 64}, "auto_awq,auto_gptqq", FormatError, "Did you mean auto_gptq"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_any_work(
    llama_folder: Path, tmp_path: Path, settings: dict[str, Any], format: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantised(llama_folder, tmp_path / "out", format, **settings)
    assert not (tmp_path / "out").exists()


def test_conversion_refuses_and_rounds_again_on_request(llama_folder: Path, tmp_path: Path) -> None:
    rules = {"*.down_proj": {"bits": 8}, "*.o_proj": {"bits": 3}}
    folder = quantised(llama_folder, tmp_path / "mixed", "auto_round", layer_config=rules)
    with pytest.raises(FormatError, match=r"auto_awq cannot hold 4 of 14 .*AWQ holds 4 bits.*auto_gptq|auto_round"):
        convert(folder, tmp_path / "out", "auto_awq")
    with pytest.raises(FormatError, match="--requantize"):
        convert(folder, tmp_path / "out", "auto_awq", scheme="W4A16G32")
    with pytest.raises(FormatError, match=r"down_proj.*8 or more bits.*--scheme"):
        convert(folder, tmp_path / "out", "auto_awq", requantize=True)
    done = convert(folder, tmp_path / "out", "auto_awq", requantize=True, scheme="W4A16G32")
    before, after = codes(folder), codes(tmp_path / "out")
    assert {loss.layer for loss in done.losses} == {name for name in before if "down" in name or "o_proj" in name}
    for loss in done.losses:
        old, new = before[loss.layer].dequantize(), after[loss.layer].dequantize()
        assert loss.error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert (loss.before, loss.after) == (before[loss.layer].scheme.name, "W4A16G32")
        assert 0 <= loss.error < 0.2  # 3 bits are a part of the grid of 4 bits
    assert 0 < done.error < max(loss.error for loss in done.losses)
    lost = {loss.layer for loss in done.losses}
    assert all(after[name].same(before[name]) for name in before if name not in lost)


def test_conversion_leaves_a_full_folder_alone(sym: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        convert(sym / "auto_round", tmp_path / "full", "auto_gptq")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["mine"]
    convert(sym / "auto_round", tmp_path / "full", "auto_gptq", overwrite=True)
    assert same_codes(tmp_path / "full", sym / "auto_round")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["full"]


def test_sizes_and_provenance_are_those_of_the_folder(sym: Path) -> None:
    found = inspect(sym / "auto_round")
    weights = sum(row.out_features * row.in_features for row in found.layers)
    assert found.bits_per_weight == pytest.approx(4 + (16 + 4) / 32)
    assert found.bytes_coded == pytest.approx(weights * found.bits_per_weight / 8)
    size = (sym / "auto_round" / "model.safetensors").stat().st_size
    assert 0 < size - found.bytes_coded - found.bytes_plain < 10_000  # the header
    assert found.provenance["seed"] == 42
    assert json.loads(found.to_json())["layers"][0]["kind"] == "W4A16G32"


def damaged(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> None:
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value


@pytest.mark.parametrize("format", CODED)
def test_missing_and_misshapen_tensors_are_named(sym: Path, tmp_path: Path, format: str) -> None:
    scale = f"{UP}.{'weight_scale' if format == 'llm_compressor' else 'scales'}"
    key = f"{UP}.{'weight_packed' if format == 'llm_compressor' else 'qweight'}"
    good = load_file(sym / format / "model.safetensors")
    folder = copy(sym / format, tmp_path)
    for name, value, message in (
        (scale, None, rf"model\.safetensors: layer '{UP}' has no tensor {scale}"),
        (scale, good[scale][:, :-1], rf"layer '{UP}' has (shapes|tensors of shapes)"),
        (key, good[key][:-1], rf"layer '{UP}' has (shapes|tensors of shapes)"),
        (key, good[key].float(), rf"tensor '{key}' has dtype F32, not torch\.int32"),
    ):
        rewrite(folder, lambda tensors: (tensors.update(good), damaged(tensors, name, value))[0])  # noqa: B023
        with pytest.raises(FormatError, match=message):
            inspect(folder)
        with pytest.raises(FormatError, match=message):
            convert(folder, tmp_path / "out", "fake")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", CODED)
def test_scales_that_are_not_finite_are_reported(sym: Path, tmp_path: Path, format: str) -> None:
    name = f"{UP}.{'weight_scale' if format == 'llm_compressor' else 'scales'}"
    folder = copy(sym / format, tmp_path)
    rewrite(folder, lambda tensors: tensors[name].__setitem__((0, 0), float("nan")))
    (problem,) = inspect(folder).problems or ()
    assert name in problem
    assert inspect(folder, check=False).problems is None
    with pytest.raises(FormatError, match=name):
        convert(folder, tmp_path / "out", "auto_round")


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("auto_round", {"bits": 8}, "the config does not fit"),
        ("auto_round", {"group_size": 64}, "W4A16G64 needs"),
        ("auto_round", {"packing_format": "auto_round:auto_awq"}, "does not fit|belong together"),
        ("auto_round", {"extra_config": {UP: {"bits": 16}}}, f"{UP}.*says that it is kept"),
        ("auto_gptq", {"bits": 8}, "the config does not fit"),
        ("auto_gptq", {"checkpoint_format": "gptq_p"}, "gptq_p"),
        ("auto_gptq", {"checkpoint_format": "gptq_v2"}, "not all 8"),
        ("auto_gptq", {"dynamic": {f"-:{UP}": {}}}, f"{UP}.*says that it is kept"),
        ("auto_awq", {"version": "gemv"}, "gemv"),
        ("auto_awq", {"group_size": 64}, "W4A16G64 needs"),
        ("llm_compressor", {"config_groups": {}}, "config_groups is empty"),
        ("llm_compressor", {"format": "int-quantized", "config_groups": {"a": {"weights": {}}}}, "int-quantized"),
        ("llm_compressor", {"ignore": [UP]}, f"{UP}.*says that it is kept"),
        ("llm_compressor", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not read here"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(
    sym: Path, tmp_path: Path, format: str, changes: dict[str, Any], message: str
) -> None:
    folder = copy(sym / format, tmp_path)
    reconfigure(folder, **changes)
    with pytest.raises(AutoRoundError, match=message):
        convert(folder, tmp_path / "out", "fake")


def test_damaged_files_are_named(sym: Path, llama_folder: Path, tmp_path: Path) -> None:
    whole = copy(sym / "auto_gptq", tmp_path)
    (whole / "model.safetensors").write_bytes((sym / "auto_gptq" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model\.safetensors: truncated"):
        inspect(whole)
    shards = tmp_path / "shards"
    tuner = AutoRound(llama_folder, group_size=32, recipe="rtn", device="cpu", compute_dtype="float32")
    tuner.quantize_and_save(shards, format="auto_gptq", max_shard_size="40KB")
    assert same_codes(shards, sym / "auto_gptq")
    index = shards / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00002-of", "../model-00002-of"))
    with pytest.raises(SourceError, match="outside the folder"):
        inspect(shards)
    index.write_text(text)
    (shards / next(iter(sorted(f.name for f in shards.glob("*-00002-*"))))).unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-.*not in the folder"):
        convert(shards, tmp_path / "out", "auto_round")
