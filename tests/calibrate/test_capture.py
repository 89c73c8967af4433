"""Running a model block by block must be the model itself, for models that call their blocks in different ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from auto_round.calibrate.capture import logits_of
from auto_round.calibrate.front import Walk
from auto_round.calibrate.walker import head_inputs, walk
from auto_round.source.blocks import block_names, find_block_lists
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
WIDE = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
WIDE_4 = {**WIDE, "num_hidden_layers": 4, "vocab_size_per_layer_input": 128, "sliding_window": 8}
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=96, max_position_embeddings=64),
    "bloom": BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=128),
    "falcon": FalconConfig(**SMALL, alibi=False),
    "qwen2": Qwen2Config(**{k: v for k, v in WIDE.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**WIDE),
    "phi3": Phi3Config(**{k: v for k, v in WIDE.items() if k != "head_dim"}),
    # Six layers with a window of 8: sliding and full attention get different masks and rotary tables.
    "gemma3": Gemma3TextConfig(**{**WIDE, "num_hidden_layers": 6}, sliding_window=8, max_position_embeddings=64),
    # The last two layers read keys and values that the first two left for them.
    "gemma4": Gemma4TextConfig(**WIDE_4, **SHARED, hidden_size_per_layer_input=16, global_head_dim=32),
    "gemma3n": Gemma3nTextConfig(**WIDE_4, **SHARED, hidden_size_per_layer_input=16, laurel_rank=8),
}


def skeleton_of(folder: Path) -> Skeleton:
    return Skeleton(AutoConfig.from_pretrained(folder), Checkpoint(folder))


def settings(**changes: object) -> Walk:
    values: dict[str, object] = {
        "batch_size": 3,
        "quantised_inputs": True,
        "device": CPU,
        "dtype": torch.float32,
        "store": CPU,
        **changes,
    }
    return Walk(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_block_by_block_is_the_model(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    names = block_names(skeleton.model, find_block_lists(skeleton.model))
    last = None
    for block in walk(skeleton, names, tokens, settings()):
        last = block
    assert last is not None
    head = skeleton.model.get_output_embeddings()
    with torch.no_grad():
        expected = model(tokens).logits
        weight = model.get_output_embeddings().weight
        for rows, inputs in head_inputs(skeleton, names, tokens, last.inputs, head, settings()):
            assert torch.allclose(inputs @ weight.t(), expected[rows], atol=1e-4)
    assert torch.equal(last.inputs, last.targets)


@pytest.mark.parametrize("rows", [[0, 0, 1, 0, 2], [1]], ids=["the first two alike", "one sample"])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_what_blocks_are_called_with_follows_every_sample(
    name: str, rows: list[int], tmp_path: Path, tokens: torch.Tensor
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).eval().save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    names = block_names(skeleton.model, find_block_lists(skeleton.model))
    whole, some = (
        [block.targets.clone() for block in walk(skeleton, names, samples, settings())]
        for samples in (tokens, tokens[rows])
    )
    for expected, found in zip(whole, some, strict=True):
        torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=1e-5)


def test_the_quantised_chain_feeds_the_next_block(llama_folder: Path, tokens: torch.Tensor) -> None:
    skeleton = skeleton_of(llama_folder)
    names = ["model.layers.0", "model.layers.1"]
    seen = []
    for block in walk(skeleton, names, tokens, settings()):
        seen.append((block.inputs.clone(), block.targets.clone()))
        for linear in block.linears.values():
            linear.weight.data.mul_(0.9)  # what a tuner leaves behind
    model = tiny_llama()
    with torch.no_grad():
        original = model.model(tokens, output_hidden_states=True).hidden_states
        for module in model.model.layers[0].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(0.9)
        changed = model.model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(seen[0][0], original[0])
    assert torch.allclose(seen[0][1], original[1], atol=1e-5)
    assert torch.allclose(seen[1][0], changed[1], atol=1e-5)
    assert not torch.allclose(changed[1], original[1], atol=1e-3)


def test_without_quantised_inputs_two_stores_take_turns(
    llama_folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    skeleton = skeleton_of(llama_folder)
    on_disk = settings(quantised_inputs=False, cache=tmp_path)
    assert len(list(walk(skeleton, ["model.layers.0", "model.layers.1"], tokens, on_disk))) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["original", "spare"]


def test_without_quantised_inputs_every_block_sees_the_original_chain(llama_folder: Path, tokens: torch.Tensor) -> None:
    skeleton = skeleton_of(llama_folder)
    inputs = []
    for block in walk(skeleton, ["model.layers.0", "model.layers.1"], tokens, settings(quantised_inputs=False)):
        inputs.append(block.inputs.clone())
        for linear in block.linears.values():
            linear.weight.data.zero_()
    with torch.no_grad():
        original = tiny_llama().model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(inputs[1], original[1], atol=1e-5)


def test_padding_on_the_right_does_not_reach_real_tokens(llama_folder: Path, tokens: torch.Tensor) -> None:
    padded = tokens.clone()
    padded[:, 20:] = 0
    outputs = []
    for batch in (tokens, padded):
        skeleton = skeleton_of(llama_folder)
        block = next(iter(walk(skeleton, ["model.layers.0", "model.layers.1"], batch, settings())))
        outputs.append(block.targets[:, :20])
    assert torch.allclose(*outputs, atol=1e-6)


def test_a_device_that_runs_out_behind_the_blocks_is_no_model_without_logits(tokens: torch.Tensor) -> None:
    model = tiny_llama()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model.lm_head.register_forward_hook(full)
    hidden = torch.zeros(*tokens.shape, model.config.hidden_size)
    with pytest.raises(torch.OutOfMemoryError):
        logits_of(model, ["model.layers.0", "model.layers.1"], tokens, hidden)
