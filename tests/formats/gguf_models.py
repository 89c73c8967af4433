"""Tiny random models of every architecture that is written as GGUF, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from auto_round import AutoRound

ROWS = 320
TEXTS = ["the quick brown fox jumps over the lazy dog. " * 4, "pack my box with five dozen liquor jugs! " * 4] * 4

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": ROWS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 32,
    },
    "phi3": {"model_type": "phi3", "head_dim": 16, "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", "head_dim": 16, **EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "norm_topk_prob": True},
}


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """256 bytes, three special tokens and some merges, split as GPT-2 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257, "<unk>": 258}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "x"), ("Ġ", "j"), ("u", "m")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    wrapped.chat_template = template
    return wrapped


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Characters with bytes to fall back on, spaces as U+2581, and runs of them as added tokens, as Gemma has."""
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ("\u2581", *"abcx\n", "ab", "\u2581a", "\u2581\u2581", "\u2581\u2581\u2581"):
        vocabulary[token] = len(vocabulary)
    merges = [("\u2581", "\u2581"), ("\u2581\u2581", "\u2581"), ("a", "b"), ("\u2581", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    wrapped.add_tokens(
        [AddedToken(text, normalized=False) for text in ("\u2581\u2581", "\u2581\u2581\u2581", "<u\u2581>")]
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<|\u2581|>"]})
    return wrapped


def tiny_model(name: str, folder: Path, **changes: Any) -> Path:
    """Write the tiny model called `name` with its tokenizer; norms are not all ones, so that their road is tested."""
    values = {**COMMON, **CONFIGS[name], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(4.0)  # logits of a size at which a wrong rotation shows
    model.save_pretrained(folder)
    byte_tokenizer("{{ messages }}").save_pretrained(folder)
    return folder


def quantised(source: Path, output: Path, kind: str, **changes: Any) -> Path:
    """Round `source` to nearest; returns the file."""
    settings = {"recipe": "rtn", "iters": 0, "device": "cpu", "compute_dtype": "float32", **changes}
    AutoRound(source, **settings).quantize_and_save(output, format=f"gguf:{kind}")
    return next(output.glob("*.gguf"))
