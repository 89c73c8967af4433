"""GGUF files as sources: opened, inspected, converted, and refused when damaged; through the command where users do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.formats.gguf_models import quantised, tiny_model
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.cli.dispatch import dispatch
from auto_round.conversion import convert
from auto_round.errors import FormatError, SourceError
from auto_round.formats import open_coded
from auto_round.formats.gguf.reader import GgufFile, read_floats, read_layers
from auto_round.load import load_qtensors
from auto_round.report.inspection import inspect

UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_model(name, tmp_path_factory.mktemp(name)) for name in ("gemma3", "qwen2")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A q4_k_m file of rows of 256, so that its layers really are of K types."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return quantised(tiny_model("qwen2", folder / "in", **changes), folder / "out", "q4_k_m")


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        dispatch("auto-round", "default", tuple(map(str, words)))
    return int(stop.value.code or 0)


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_a_file_opens_as_a_quantised_model(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    file = quantised(sources["gemma3"], tmp_path / "out", kind)
    for path in (file, file.parent):
        model = open_coded(path, tmp_path / f"scratch-{path.name}")
        assert model.format == f"gguf:{kind}"
        floats = dict(read_floats(file))
        for name, layer in model.layers.items():
            assert layer.kind == kind.upper()
            assert torch.equal(model.weight(name), floats[f"{name}.weight"])
        name = "model.layers.0.mlp.up_proj"
        if kind == "q4_0":
            assert torch.equal(model.codes(name).dequantize(), floats[f"{name}.weight"])
        else:
            with pytest.raises(FormatError, match="q5_1"):
                model.codes(name)
        assert torch.equal(model.checkpoint.tensor("model.norm.weight"), floats["model.norm.weight"])
        assert model.config["model_type"] == "gemma3_text"
        assert any(extra.name == "tokenizer.json" for extra in model.extra)


def test_files_convert_to_floats_and_exact_ones_to_integers(sources: dict[str, Path], tmp_path: Path) -> None:
    for kind, target in (("q8_0", "auto_round"), ("q4_0", "fake"), ("q4_k_m", "fake")):
        file = quantised(sources["qwen2"], tmp_path / f"{kind}-{target}", kind)
        convert(file, tmp_path / f"{kind}-{target}-out", target)
        floats = dict(read_floats(file))
        if target == "auto_round":
            found = {f"{n}.weight": t.dequantize() for n, t in load_qtensors(tmp_path / f"{kind}-{target}-out")}
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-{target}-out", dtype=torch.float32)
            found = {name: value for name, value in model.state_dict().items() if "proj.weight" in name}
        assert found
        for name, value in found.items():
            torch.testing.assert_close(value, floats[name], rtol=1e-2 if target == "fake" else 0, atol=1e-6)
    with pytest.raises(FormatError, match="grid of its own"):
        convert(file, tmp_path / "no", "auto_round")


def test_a_missing_shard_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    AutoRound(sources["qwen2"], recipe="rtn", device="cpu").quantize_and_save(
        tmp_path / "out", format="gguf:q8_0", max_shard_size="60KB"
    )
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(open_coded(files[0], tmp_path / "a").layers) == 15
    files[1].unlink()
    with pytest.raises(FormatError, match=files[1].name):
        open_coded(files[0], tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "lost"),
    [("llama3", r"the scaling of its positions"), ("mixtral", "its experts"), ("llama", "the biases of its attention")],
)
def test_files_of_which_another_model_would_come_are_refused(name: str, lost: str, tmp_path: Path) -> None:
    file = quantised(tiny_model(name, tmp_path / "in"), tmp_path / "out", "q8_0")
    assert inspect(file).layers
    with pytest.raises(FormatError, match=f"does not read {lost} from GGUF"):
        convert(file, tmp_path / "converted", "auto_round")
    with pytest.raises(SourceError, match=rf"does not read {lost}.*the original model's folder"):
        AutoRound(file, recipe="rtn", device="cpu").quantize_and_save(tmp_path / "again")


def test_files_whose_weights_transformers_does_not_find_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    AutoRound(sources["qwen2"], recipe="rtn", device="cpu").quantize_and_save(
        tmp_path / "out", format="gguf:q8_0", max_shard_size="60KB"
    )
    part = min((tmp_path / "out").glob("*.gguf"))
    with pytest.raises(SourceError, match="is a part of a model in several files"):
        AutoRound(part, recipe="rtn", device="cpu").quantize_and_save(tmp_path / "again")
    alone = part.rename(part.with_name("alone.gguf"))
    with pytest.raises(SourceError, match=r"finds no values in it for \d+ parameters of Qwen2ForCausalLM"):
        AutoRound(alone, recipe="rtn", device="cpu").quantize_and_save(tmp_path / "again")


def test_a_file_is_inspected(wide: Path) -> None:
    found = inspect(wide)
    kinds = {row.name: row.kind for row in found.layers}
    assert (found.format, found.problems) == ("gguf:q4_k_m", ())
    assert kinds["model.layers.0.self_attn.q_proj"] == "Q4_K"
    assert kinds["lm_head"] == "Q6_K"
    file = GgufFile(wide)
    stored = {name: tensor.n_bytes for name, tensor in file.tensors.items()}
    assert found.bytes_coded == sum(
        size for name, size in stored.items() if name != "token_embd.weight" and size > 4096
    )
    assert found.provenance["seed"] == "42"
    assert [obstacle for name, obstacle in found.clients.items() if "llama.cpp" in name] == [None]


def test_the_command_inspects_and_converts_a_file(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("inspect", wide) == 0
    text = capsys.readouterr().out
    assert "Q4_K" in text
    assert "every tensor was read and is sound" in text
    assert command("convert", wide, "--format", "fake", tmp_path / "floats") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    for name, value in read_floats(wide):
        torch.testing.assert_close(model.state_dict()[name], value.float(), rtol=1e-3, atol=1e-6, msg=name)
    for target in ("auto_gptq", "gguf:q4_k_m"):
        assert command("convert", wide, "--format", target, tmp_path / "no") == 2
        assert "only --format fake (floats) is exact" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_blocks_are_rounded_again_on_request_and_the_loss_is_told(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--format", "auto_round", tmp_path / "out", "--requantize", "--json")
    assert command("convert", wide, *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["losses"]) == told["layers"] == 15
    before, after = dict(read_floats(wide)), dict(load_qtensors(tmp_path / "out"))
    for loss in told["losses"]:
        old, new = before[f"{loss['layer']}.weight"], after[loss["layer"]].dequantize()
        assert loss["error"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        assert 0 < loss["error"] < 0.15


@pytest.mark.parametrize("cut", [3, 40, 5000])
def test_a_file_cut_in_its_head_is_named(wide: Path, tmp_path: Path, cut: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(wide.read_bytes()[:cut])
    with pytest.raises(FormatError, match=r"broken\.gguf"):
        list(read_layers(broken))


def test_a_file_cut_in_its_tensors_is_named_with_the_tensor(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = list(GgufFile(wide).tensors)[-1]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(wide.read_bytes()[:-100])
    for words in (("inspect", broken), ("convert", broken, "--format", "fake", tmp_path / "out")):
        assert command(*words) == 2
        text = " ".join(capsys.readouterr().err.split())
        assert "broken.gguf" in text
        assert f"tensor '{last}' does not fit in the file" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dimension", "rows"), [(1, 8), (1, 4096), (0, 512)])
def test_a_tensor_of_another_size_than_its_data_is_named(wide: Path, tmp_path: Path, dimension: int, rows: int) -> None:
    """Dimensions in the head are changed; the data stay."""
    field = GgufFile(wide).tensors[UP].field
    name, dims = field.parts[1], field.parts[3]
    place = field.offset + field.parts[0].nbytes + name.nbytes + field.parts[2].nbytes + 8 * dimension
    data = bytearray(wide.read_bytes())
    assert int.from_bytes(data[place : place + 8], "little") == dims[dimension]
    data[place : place + 8] = rows.to_bytes(8, "little")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    after = list(GgufFile(wide).tensors)[list(GgufFile(wide).tensors).index(UP) + 1]
    with pytest.raises(FormatError, match=rf"broken\.gguf.*tensor '({UP}|{after})'"):
        inspect(broken)


def test_blocks_that_are_not_finite_are_reported(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = int(GgufFile(wide).tensors[UP].data_offset)
    data = bytearray(wide.read_bytes())
    data[start : start + 2] = b"\x00\x7e"  # d of the first block: NaN
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    (problem,) = inspect(broken).problems or ()
    assert "broken.gguf: layer 'model.layers.1.mlp.up_proj' holds infinity or NaN" in problem
    assert command("inspect", broken) == 2
    assert command("convert", broken, "--format", "fake", tmp_path / "out") == 2
    assert "infinity or NaN" in " ".join(capsys.readouterr().err.split())
