"""What quantization_config means for each layer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoRoundConfig

from auto_round.errors import FormatError
from auto_round.formats.config import AWQ, GPTQ_V1, RAW, CheckpointConfig
from auto_round.spec.scheme import Scheme

NAMES = ["model.layers.0.q", "model.layers.1.q", "model.layers.10.q", "model.layers.1.down", "lm_head"]


def parse(**keys: Any) -> CheckpointConfig:
    return CheckpointConfig.parse({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, **keys})


def test_exact_names_come_before_patterns_and_are_no_patterns() -> None:
    config = parse(extra_config={"layers.1": {"bits": 2}, "model.layers.1.q": {"bits": 8}, "lm_head": {"bits": 3}})
    schemes = config.resolve(NAMES, ["model.layers"])
    assert schemes == {
        "model.layers.0.q": Scheme(4, 128),
        "model.layers.1.q": Scheme(8, 128),
        "model.layers.10.q": Scheme(2, 128),  # "layers.1" is found in it: keys that name no layer are patterns
        "model.layers.1.down": Scheme(2, 128),
        "lm_head": Scheme(3, 128),
    }


def test_an_exact_name_is_not_searched_for_in_longer_ones() -> None:
    schemes = parse(extra_config={"mlp.down": {"bits": 8}}).resolve(["mlp.down", "mlp.down2"])
    assert schemes == {"mlp.down": Scheme(8, 128), "mlp.down2": Scheme(4, 128)}


def test_blocks_are_matched_by_whole_names() -> None:
    schemes = parse(block_name_to_quantize="model.layers.1, other").resolve(NAMES, ["model.layers.1"])
    assert [name for name, scheme in schemes.items() if scheme] == ["model.layers.1.q", "model.layers.1.down"]
    assert parse(block_name_to_quantize="model.layers.1, other").blocks == ("model.layers.1", "other")
    assert parse(quant_block_list=[["a.0", "a.1"], ["b.0"]]).blocks == ("a.0", "a.1", "b.0")
    assert parse().blocks == ()


def test_everything_is_quantised_where_no_blocks_are_given() -> None:
    assert set(parse(extra_config={"lm_head": {"bits": 16}}).resolve(NAMES).values()) == {Scheme(4, 128), None}


def test_modules_not_to_convert_and_modules_in_blocks() -> None:
    schemes = parse(modules_to_not_convert=["layers.1"]).resolve(NAMES, ["model.layers"])
    assert [name for name, scheme in schemes.items() if scheme] == ["model.layers.0.q", "model.layers.10.q"]
    schemes = parse(modules_in_block_to_quantize=[["down"], ["up"]]).resolve(NAMES, ["model.layers"])
    assert [name for name, scheme in schemes.items() if scheme] == ["model.layers.1.down"]


def test_dynamic_rules_match_from_the_start() -> None:
    schemes = parse(dynamic={r"-:.*\.1\.q": {}, r"+:model\.layers\.1\.": {"bits": 8}, "q": {"bits": 2}}).resolve(NAMES)
    assert schemes["model.layers.1.q"] is None
    assert schemes["model.layers.1.down"] == Scheme(8, 128)
    assert schemes["model.layers.0.q"] == Scheme(4, 128)


@pytest.mark.parametrize(
    ("keys", "packing", "backend"),
    [
        ({}, GPTQ_V1, "auto"),
        ({"packing_format": "auto_round:awq", "backend": "torch"}, AWQ, "torch"),
        ({"backend": "auto_round:auto_awq"}, AWQ, "auto"),
        ({"packing_format": "auto_round:gptq", "backend": "auto_round"}, RAW, "auto"),  # transformers fills in gptq
        ({"packing_format": "auto_round:auto_awq", "backend": "auto_round:auto_gptq"}, AWQ, "auto"),
        ({"packing_format": "auto_round:gptq", "checkpoint_format": "gptq_v2"}, RAW, "auto"),
        ({"backend": "auto_round:exllamav2"}, GPTQ_V1, "auto_round:exllamav2"),
    ],
)
def test_packing_and_backend(keys: dict[str, Any], packing: str, backend: str) -> None:
    config = parse(**keys)
    assert (config.packing, config.backend) == (packing, backend)


def test_awq_files_say_zero_point_instead_of_sym() -> None:
    keys = {"packing_format": "auto_round:awq", "group_size": 32}
    assert parse(**keys, zero_point=True).scheme == Scheme(4, 32, sym=False)
    assert parse(**keys, zero_point=False).scheme == Scheme(4, 32, sym=True)


def test_transformers_own_object_is_read_too() -> None:
    config = CheckpointConfig.parse(AutoRoundConfig(bits=8, group_size=-1, sym=False, extra_config={"a": {"bits": 16}}))
    assert (config.scheme, config.packing, config.extra) == (Scheme(8, -1, False), GPTQ_V1, {"a": None})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 5}, r"quantization_config: bits=5"),
        ({"bits": 16}, r"nothing in it is quantised"),
        ({"group_size": 0}, r"group_size=0"),
        ({"packing_format": "auto_round:auto_gtpq"}, r"Did you mean auto_round:auto_gptq"),
        ({"checkpoint_format": "gptq_p"}, r"checkpoint_format 'gptq_p'"),
        ({"rotation_config": {"type": "hadamard"}}, r"rotation_config"),
        ({"extra_config": {"head": {"bits": 4, "data_type": "fp"}}}, r"extra_config\['head'\]: data_type 'fp'"),
        ({"extra_config": {"head": {"act_bits": 8}}}, r"extra_config\['head'\]: act_bits=8"),
        ({"packing_format": "auto_round:awq", "desc_act": True}, r"desc_act.*no g_idx"),
        ({"packing_format": "auto_round:awq", "version": "gemv"}, r"AWQ version 'gemv'"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(**keys)


def test_kept_layers_may_say_anything() -> None:
    assert parse(extra_config={"head": {"bits": 16, "data_type": "float", "act_bits": 16}}).extra == {"head": None}
