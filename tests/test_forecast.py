"""`auto-round plan`: what it says is what happens."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.cli.quantise import show_forecast
from auto_round.formats import FORMATS
from auto_round.formats.clients import Held, clients
from auto_round.pipeline import timing
from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LinearShape, make_plan
from auto_round.spec.scheme import Scheme
from tests import killing
from tests.conftest import tiny_llama


@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_sizes_are_exact_in_every_format(llama_folder: Path, tmp_path: Path, shard: str) -> None:
    settings: dict[str, Any] = {"recipe": "rtn", "group_size": 32, "device": "cpu", "compute_dtype": "float32"}
    names = [name for name in FORMATS if not name.startswith("gguf")]  # those are tested beside their writer
    forecast = AutoRound(llama_folder, **settings).plan(tmp_path / "out", names, max_shard_size=shard)
    AutoRound(llama_folder, **settings).quantize_and_save(tmp_path / "out", names, max_shard_size=shard)
    for entry in forecast.formats:
        folder = tmp_path / "out" / entry.format.replace(":", "-")
        written = {f.name: f.stat().st_size for f in folder.iterdir() if f.name in entry.files or "model" in f.name}
        assert entry.files == written, entry.format
        assert len(written) == 1 or shard == "200KB"


def test_the_forecast_lists_every_layer_and_writes_nothing(llama_folder: Path, tmp_path: Path) -> None:
    rules: dict[str, Any] = {"*.q_proj": {"bits": 8}, "*.0.mlp.down_proj": "keep"}
    forecast = AutoRound(llama_folder, layer_config=rules, **killing.SETTINGS).plan(tmp_path / "out")
    schemes = {layer.name: (layer.scheme, layer.reason) for layer in forecast.layers}
    assert len(schemes) == 15
    assert schemes["model.layers.1.self_attn.q_proj"] == ("W8A16G32", "layer_config '*.q_proj'")
    assert schemes["model.layers.0.mlp.down_proj"] == ("kept", "layer_config '*.0.mlp.down_proj'")
    assert schemes["lm_head"] == ("kept", "outside the blocks")
    assert any("q_proj W8A16G32; k_proj, v_proj W4A16G32" in problem for problem in forecast.problems)
    assert forecast.formats[0].clients["transformers with this package"] is None
    assert "alike" in str(forecast.formats[0].clients["vLLM"])
    assert list(tmp_path.iterdir()) == []
    assert json.loads(forecast.to_json())["peak_bytes"] == forecast.peak_bytes > 10**8
    assert 0 < forecast.total_seconds < 600


def test_samples_that_the_model_writes_take_time_of_their_own(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.pipeline.needs.resident_bytes", lambda: 500_000_000)
    plain, more, most = (
        AutoRound(llama_folder, self_nsamples=count, **killing.SETTINGS).plan(tmp_path / "out")
        for count in (0, 8, 4096)
    )
    assert "writing" not in plain.seconds
    assert 0 < more.seconds["writing"] < most.seconds["writing"]
    assert "writing" not in plain.memory
    assert 0 < more.memory["writing"] < most.memory["writing"]
    sampled = AutoRound(llama_folder, **{**killing.SETTINGS, "dataset": "self"}).plan(tmp_path / "out")
    assert sampled.seconds["writing"] > 0


@pytest.mark.parametrize(("given", "alike"), [(128, True), (8, False)])
def test_written_samples_take_part_in_starts_only_where_given_ones_are_few(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int, alike: bool
) -> None:
    rates = timing.Rates(*[1e-9] * len(dataclasses.fields(timing.Rates)))
    monkeypatch.setattr("auto_round.pipeline.forecast._rates", lambda *_: (rates, None))
    settings = {**killing.SETTINGS, "nsamples": given}
    few, more = (
        AutoRound(llama_folder, self_nsamples=count, **settings).plan(tmp_path / "out").seconds for count in (0, 16)
    )
    assert (more["starts"] == few["starts"]) == alike
    assert more["starts"] >= few["starts"]
    assert more["passes"] > few["passes"]


def test_the_command_plans_for_programs(llama_folder: Path, tmp_path: Path) -> None:
    words = ["plan", str(llama_folder), "--group-size", "32", "--nsamples", "4", "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "auto_round", *words, "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said["formats"][0]["bytes"] > said["journal_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_command_plans_for_people(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_forecast(AutoRound(llama_folder, **killing.SETTINGS).plan(tmp_path / "out"), as_json=False)
    told = " ".join(capsys.readouterr().out.split())
    for fact in ("W4A16G32", "lm_head", "Peak memory", "opens in transformers", "Time about"):
        assert fact in told


def plan_of(rules: dict[str, Any], scheme: Scheme) -> Any:
    names = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")]
    shapes = [LinearShape(name, 128, 192) for name in names]
    return make_plan(shapes, [], ["model.layers"], scheme, rules, lambda *_: None)


@pytest.mark.parametrize(
    ("rules", "scheme", "format", "obstacle"),
    [
        ({}, Scheme(4, 64), "auto_round", None),
        ({}, Scheme(4, 128), "auto_round", "does not divide"),
        ({}, Scheme(4, 96), "auto_round", "groups of"),
        ({}, Scheme(4, 64, False), "auto_round", None),
        ({}, Scheme(2, 64, False), "auto_round", "packing"),
        ({}, Scheme(2, 64, False), "auto_gptq", "asymmetric"),
        ({}, Scheme(2, 64), "auto_gptq", "of 4 and 8 bits only"),
        ({"*.k_proj": {"bits": 8}}, Scheme(4, 64), "auto_round", "loaded as one matrix"),
        ({"*.up_proj": {"bits": 8}}, Scheme(4, 64), "auto_round", None),
    ],
)
def test_what_vllm_opens(rules: dict[str, Any], scheme: Scheme, format: str, obstacle: str | None) -> None:
    plan = plan_of(rules, scheme)
    found = clients(Held(plan, format, FORMATS[format].settings(plan)))["vLLM"]
    assert found is None if obstacle is None else obstacle in str(found)


@pytest.mark.parametrize(
    ("own", "format", "client", "obstacle"),
    [
        ("gate_proj", "auto_gptq", "vLLM", None),
        ("gate_up_proj", "auto_gptq", "vLLM", "in one stack"),
        ("gate_up_proj", "auto_round", "SGLang", "in one stack"),
        ("gate_up_proj", "auto_gptq", "gptqmodel", "in one stack"),
        ("gate_proj", "llm_compressor", "transformers with compressed-tensors", "dequantize=True"),
    ],
)
def test_who_finds_experts(own: str, format: str, client: str, obstacle: str | None) -> None:
    shapes = [LinearShape(f"model.layers.0.mlp.experts.{i}.{own}", 128, 192) for i in range(2)]
    plan = make_plan(shapes, [], ["model.layers"], Scheme(4, 64), {}, lambda *_: None)
    found = clients(Held(plan, format, FORMATS[format].settings(plan)))[client]
    assert found is None if obstacle is None else obstacle in str(found)


def test_dequantising_by_one_scheme_is_told_where_there_are_more() -> None:
    plan = plan_of({"*.up_proj": {"bits": 8}}, Scheme(4, 64, False))
    held = Held(plan, "llm_compressor", FORMATS["llm_compressor"].settings(plan))
    assert "as of one scheme" in str(clients(held)["transformers with compressed-tensors"])


def test_a_kept_part_of_a_fused_matrix_is_a_conflict() -> None:
    (sentence,) = broken_fusions(plan_of({"*.v_proj": "keep"}, Scheme(4, 64)))
    assert "v_proj kept" in sentence


def test_memory_that_is_short_is_met_or_refused(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this process itself holds moves by tens of megabytes from one call to the next.
    monkeypatch.setattr("auto_round.pipeline.needs.resident_bytes", lambda: 500_000_000)
    wide = tiny_llama(max_position_embeddings=4096)
    wide.save_pretrained(tmp_path / "wide")
    settings = {**killing.SETTINGS, "seqlen": 2048, "nsamples": 64, "batch_size": 8}
    free = AutoRound(tmp_path / "wide", **settings).plan(tmp_path / "out")
    assert (free.activations, free.samples_per_forward) == ("in memory", 8)
    limit = free.memory["tuning"] - 2 * 64 * 2048 * 96 * 4 - 40_000_000
    less = AutoRound(tmp_path / "wide", max_memory=limit, **settings).plan(tmp_path / "out")
    assert (less.activations, less.samples_per_forward) == ("on disk", 4)
    least = AutoRound(tmp_path / "wide", max_memory=1000, **settings).plan(tmp_path / "out")
    assert least.samples_per_forward == 1
    assert any("max_memory allows" in problem for problem in least.problems)


def test_a_folder_that_cannot_be_written_is_a_problem(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = timing._disk

    def refusing(folder: Path) -> tuple[float, float]:
        if folder == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return measured(folder)

    monkeypatch.setattr(timing, "_disk", refusing)
    problems = AutoRound(llama_folder, **killing.SETTINGS).plan(tmp_path / "out").problems
    assert any(f"{tmp_path}: cannot be written: Permission denied" in problem for problem in problems)
