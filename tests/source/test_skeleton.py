from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_llama
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from auto_round.errors import SourceError
from auto_round.source.blocks import block_names, find_block_lists, linears_in
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton


def skeleton_of(folder: Path) -> Skeleton:
    return Skeleton(AutoConfig.from_pretrained(folder), Checkpoint(folder))


def test_blocks_are_found_in_the_module_tree() -> None:
    assert find_block_lists(tiny_llama()) == ["model.layers"]
    opt = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=64,
            word_embed_proj_dim=32,
        )
    )
    assert find_block_lists(opt) == ["model.decoder.layers"]
    assert block_names(opt, ["model.decoder.layers"])[2] == "model.decoder.layers.2"
    assert "model.decoder.layers.1.fc1" in linears_in(
        opt.get_submodule("model.decoder.layers.1"), "model.decoder.layers.1."
    )


def test_a_model_without_linear_blocks_is_refused() -> None:
    with pytest.raises(SourceError, match="no list of blocks"):
        find_block_lists(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_nothing_is_loaded_until_asked_and_all_is_freed(llama_folder: Path) -> None:
    skeleton = skeleton_of(llama_folder)
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
    assert skeleton.model.model.rotary_emb.inv_freq.device.type == "cpu"
    block = skeleton.model.get_submodule("model.layers.1")
    skeleton.load(block, "model.layers.1", torch.float32, torch.device("cpu"))
    original = dict(tiny_llama().named_parameters())
    for name, parameter in block.named_parameters(prefix="model.layers.1"):
        assert torch.equal(parameter, original[name])
    skeleton.free(block, "model.layers.1")
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}


def test_a_whole_skeleton_computes_what_the_model_computes(llama_folder: Path, tokens: torch.Tensor) -> None:
    skeleton = skeleton_of(llama_folder)
    skeleton.load(skeleton.model, "", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(skeleton.model(tokens).logits, tiny_llama()(tokens).logits)


def test_tied_weights_are_found_under_their_other_name(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    assert "lm_head.weight" not in skeleton.checkpoint
    assert skeleton.stored_name("lm_head.weight") == "model.embed_tokens.weight"
    assert skeleton.missing() == []
    assert skeleton.is_tied("lm_head.weight")


def test_a_checkpoint_of_the_bare_model_lacks_the_prefix(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).transformer.save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    assert skeleton.stored_name("transformer.h.0.ln_1.weight") == "h.0.ln_1.weight"
    assert skeleton.missing() == []


def test_a_config_that_lies_is_found_out(llama_folder: Path) -> None:
    config = AutoConfig.from_pretrained(llama_folder)
    config.num_hidden_layers = 3
    assert "model.layers.2.mlp.up_proj.weight" in Skeleton(config, Checkpoint(llama_folder)).missing()
    config = AutoConfig.from_pretrained(llama_folder)
    config.intermediate_size = 192
    with pytest.raises(SourceError, match=r"shape \[160, 96\], the model's config says \[192, 96\]"):
        Skeleton(config, Checkpoint(llama_folder)).weight("model.layers.0.mlp.up_proj.weight")
