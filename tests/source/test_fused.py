"""Linears put in place of Conv1D and stacks of experts compute what the original parameters did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.test_architectures import CONFIGS, logits_of, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from auto_round.load import fused_of
from auto_round.source.fused import open_fused


def weight_of(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def opened(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The model, and another whose fused parameters became Linears with the same weights."""
    plain, split = tiny(CONFIGS[name]), tiny(CONFIGS[name])
    fused = fused_of(plain)
    slices = {layer: view for item in fused for layer, view in item.slices.items()}
    open_fused(split, fused, weight_of)
    parameters = dict(plain.named_parameters())
    for layer, view in slices.items():
        linear = split.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(view.of(parameters[view.parameter]).detach().clone())
    return plain, split, slices


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_model_computes_the_same(name: str) -> None:
    plain, split, slices = opened(name)
    assert slices
    torch.testing.assert_close(logits_of(split), logits_of(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_every_expert_that_is_used_is_called_and_gets_a_gradient(name: str) -> None:
    _, split, slices = opened(name)
    called: set[str] = set()
    for layer in slices:
        split.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: called.add(layer))
    split(input_ids=torch.arange(3, 63).reshape(3, 20)).logits.square().sum().backward()
    assert called
    for layer in called:
        gradient = split.get_submodule(layer).weight.grad
        assert isinstance(gradient, Tensor)
        assert gradient.abs().sum() > 0, layer


def test_a_stack_in_any_other_operation_is_dense() -> None:
    plain, split, _ = opened("mixtral")
    stack = split.get_submodule("model.layers.0.mlp.experts").gate_up_proj
    dense = plain.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert stack.shape == dense.shape
    assert stack.dtype == dense.dtype
    assert torch.equal(torch.relu(stack), torch.relu(dense))
    assert torch.equal(stack[1:3], dense[1:3])
    assert torch.equal(stack.transpose(1, 2), dense.transpose(1, 2))
    assert torch.equal(torch.relu(stack[2]), torch.relu(dense[2]))


def test_without_experts_there_is_nothing_to_open() -> None:
    assert fused_of(AutoModelForCausalLM.from_config(CONFIGS["qwen2"])) == []
