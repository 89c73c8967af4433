"""What is typed is what the API gets, and nothing else."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from auto_round.cli.dispatch import command, normalise
from auto_round.cli.quantise import STATED, lesson_for, quantise, run
from auto_round.cli.teach import Invocation
from auto_round.report.live import LiveListener
from auto_round.spec.recipe import Recipe


class Recorder:
    """Stands where AutoRound does and keeps what it is given."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords

    def quantize_and_save(self, **keywords: Any) -> Any:
        self.saving = keywords
        return self


def given(*words: str, recipe: str = "default") -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of the constructor and of quantize_and_save after `words`."""
    invocation = Invocation(recipe, lesson_for(recipe, {}))
    params = command(quantise).make_context("auto-round", list(words), obj=invocation).params
    recorder: Any = run(params, recipe, Recorder)
    assert isinstance(recorder.keywords.pop("listener"), LiveListener)
    return recorder.keywords, recorder.saving


def test_nothing_is_passed_that_was_not_typed() -> None:
    assert given("--model", "org/model") == ({"model": "org/model", "recipe": "default"}, {})
    assert given("org/model", recipe="light") == ({"model": "org/model", "recipe": "light"}, {})


FLAGS: list[tuple[str, Any]] = [
    ("--scheme W2A16G64", ("scheme", "W2A16G64")),
    ("--bits 4", ("bits", 4)),
    ("--group_size -1", ("group_size", -1)),
    ("--sym", ("sym", True)),
    ("--asym", ("sym", False)),
    ("--quant_lm_head", ("quant_lm_head", True)),
    ("--iters 0", ("iters", 0)),
    ("--lr 5e-3", ("lr", 0.005)),
    ("--minmax_lr 0.01", ("minmax_lr", 0.01)),
    ("--nsamples 512", ("nsamples", 512)),
    ("--seqlen 512", ("seqlen", 512)),
    ("--batch_size 4", ("batch_size", 4)),
    ("--bs 4", ("batch_size", 4)),
    ("--gradient_accumulate_steps 2", ("gradient_accumulate_steps", 2)),
    ("--dataset builtin,self:num=3", ("dataset", "builtin,self:num=3")),
    ("--seed 0", ("seed", 0)),
    ("--device cuda:0", ("device", "cuda:0")),
    ("--device_map 0", ("device", "0")),
    ("--compute_dtype float32", ("compute_dtype", "float32")),
    ("--low_gpu_mem_usage", ("low_gpu_mem_usage", True)),
    ("--enable_torch_compile", ("enable_torch_compile", True)),
    ("--disable_torch_compile", ("enable_torch_compile", False)),
    ("--enable_quanted_input", ("enable_quanted_input", True)),
    ("--disable_quanted_input", ("enable_quanted_input", False)),
    ("--enable_minmax_tuning", ("enable_minmax_tuning", True)),
    ("--disable_minmax_tuning", ("enable_minmax_tuning", False)),
    ("--start search", ("start", "search")),
    ("--heldout 0.1", ("heldout", 0.1)),
    ("--finish_iters 64", ("finish_iters", 64)),
    ("--finish_lr 1e-3", ("finish_lr", 1e-3)),
    ("--finish_nsamples 512", ("finish_nsamples", 512)),
    ("--self_nsamples 32", ("self_nsamples", 32)),
    ("--trust_remote_code", ("trust_remote_code", True)),
    ("--disable_trust_remote_code", ("trust_remote_code", False)),
    ("--output_dir out_dir", ("output_dir", "out_dir")),
    ("--format auto_round,auto_gptq", ("format", "auto_round,auto_gptq")),
    ("--max_shard_size 500MB", ("max_shard_size", "500MB")),
    ("--overwrite", ("overwrite", True)),
]


@pytest.mark.parametrize("dashes", [False, True])
@pytest.mark.parametrize(("words", "expected"), FLAGS, ids=[words for words, _ in FLAGS])
def test_a_flag_becomes_its_keyword_with_either_spelling(words: str, expected: tuple[str, Any], dashes: bool) -> None:
    flag, *value = words.split()
    spelled = flag.replace("_", "-") if dashes else flag
    keywords, saving = given("m", spelled, *value)
    name, content = expected
    assert {**keywords, **saving} == {"model": "m", "recipe": "default", name: content}
    parameters = inspect.signature(_api().quantize_and_save if name in saving else _api()).parameters
    assert name in parameters


@pytest.mark.parametrize("flag", ["--model", "--model_name", "--model-name", "--model_name_or_path"])
def test_names_of_the_model_flag(flag: str) -> None:
    assert given(flag, "org/my_model-x")[0]["model"] == "org/my_model-x"  # values keep their underscores


def test_every_field_of_a_recipe_has_a_flag() -> None:
    flags = {param.name for param in command(quantise).params}
    assert {field.name for field in fields(Recipe)} <= flags


def test_aliases_are_no_names_of_other_flags() -> None:
    spellings = [spelling for param in command(quantise).params for spelling in (*param.opts, *param.secondary_opts)]
    normal = [normalise(spelling.lstrip("-")) for spelling in spellings]
    assert len(set(normal)) == len(normal)


def test_the_stated_defaults_are_those_of_the_api() -> None:
    parameters = {
        **inspect.signature(_api()).parameters,
        **inspect.signature(_api().quantize_and_save).parameters,
    }
    assert {name: parameters[name].default for name in STATED} == STATED


def test_layer_config_as_text_and_as_file(tmp_path: Path) -> None:
    rules = '{"*.down_proj": {"bits": 8}, "lm_head": "W8A16", "*.0.*": null}'
    file = tmp_path / "rules.json"
    file.write_text(rules)
    expected = {"*.down_proj": {"bits": 8}, "lm_head": "W8A16", "*.0.*": None}
    assert given("m", "--layer_config", rules)[0]["layer_config"] == expected
    assert given("m", "--layer-config", str(file))[0]["layer_config"] == expected
    assert list(given("m", "--layer_config", rules)[0]["layer_config"]) == list(expected)


def test_quiet_reaches_the_listener() -> None:
    params = command(quantise).make_context("auto-round", ["m", "--quiet"]).params
    recorder: Any = run(params, "default", Recorder)
    assert recorder.keywords["listener"]._quiet


def _api() -> Any:
    from auto_round.api import AutoRound  # imports torch, which the other tests here do not need

    return AutoRound
