"""Tiny random models of every architecture: default configs with every size shrunk by the name of its field."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

HIDDEN, VOCABULARY, LAYERS = 64, 128, 4
AUTO = {"causal-lm": AutoModelForCausalLM, "image-text-to-text": AutoModelForImageTextToText}

# (pattern for the whole name of a field, its new value); the first that matches counts. Values are whole numbers.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(vocab_size|text_vocab_size|padded_vocab_size|tgt_vocab_size|vocab_size_per_layer_input)", VOCABULARY),
    (r"(pos|type|label).*vocab_size", 8),
    (r"(num_hidden_layers|num_layers|n_layers?|depth|(num_)?(encoder|decoder)_layers|num_.*_layers)", 2),
    (r"(first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_kv_shared_layers|num_hash_layers)", 0),
    (r"(num_key_value_heads|n_kv_heads?|num_kv_heads|num_query_groups|multi_query_group_num)", 2),
    (r"(mamba_num_heads|mamba_n_heads|linear_num_value_heads|linear_num_key_heads|num_linear_heads)", 8),
    (r"(n_heads?|num_heads|.*attention_heads|.*_num_heads|index_n_heads)", 4),
    (r"(head_dim|.*_head_dim|.*_d_head|head_size|d_kv|attention_head_dim)", 16),
    (r"(kv_lora_rank|q_lora_rank|.*_lora_rank|.*_rank|lora_.*dim)", 32),
    (
        r"(moe_k|num_experts_per_tok|num_experts_per_token|moe_top_?k|top_k_experts|moe_topk|num_selected_experts|top_k)",
        2,
    ),
    (
        r"(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|ssm_num_groups|n_shared_experts|.*shared_experts)",
        1,
    ),
    (
        r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|.*num_experts|ffn_num_experts|zero_expert_num)",
        4,
    ),
    (
        r"(intermediate_size|.*_intermediate_size|ffn_dim|.*_ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner|ff_dim|.*mlp_dim)",
        96,
    ),
    (
        r"(hidden_size|.*_hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|word_embed_proj_dim|embedding_size)",
        HIDDEN,
    ),
    (
        r"(lru_width|projection_dim|proj_dim|out_hidden_size|hidden_size_per_layer_input|cross_attention_dim|embed_dim_per.*)",
        HIDDEN,
    ),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length)", 256),
    (r"(sliding_window|attention_window|attention_chunk_size|window_size|local_.*window.*)", 16),
    (r"(state_size|mamba_d_state|ssm_state_size|d_state|mamba_state_dim)", 16),
    (r"(image_size|resolution)", 32),
    (r"(patch_size)", 8),
    (r"(chunk_size|mamba_chunk_size)", 16),
)


# What names do not tell: fields by model type that make the shrunken config consistent.
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_n_heads": 8},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 2},
    "gptj": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "longcat_flash": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32},
}

# Arguments by model type for configs that derive fields from others when they are made. The rest is shrunk as ever.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
GEMMA4: dict[str, Any] = {
    **TEXT,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
DOTS3: dict[str, Any] = {
    **TEXT,
    **LATENT,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "index_head_dim": 16,
    "num_hidden_layers": 4,
    **{f"swa_{name}": value for name, value in LATENT.items()},
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 16,
}
INKLING2: dict[str, Any] = {
    **TEXT,
    "unpadded_vocab_size": 100,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "swa_num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_head_dim": 16,
}
INKLING: dict[str, Any] = {**INKLING2, "unpadded_vocab_size": None}
QWEN4: dict[str, Any] = {
    **TEXT,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
ZAMBA: dict[str, Any] = {**TEXT, "num_hidden_layers": 5, "num_key_value_heads": 4}
GIVEN: dict[str, dict[str, Any]] = {
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": TEXT,
        "encoder_config": {**TEXT, "hidden_size_global": HIDDEN},
        "decoder_config": {**TEXT, "hidden_size_global": HIDDEN},
        "global_config": {name: value for name, value in TEXT.items() if name != "vocab_size"},
    },
    "cohere_compass": {"text_config": {**TEXT, "rope_parameters": {"full_attention": ROPE}}},
    "cohere_compass_text": {**TEXT, "rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "dory": {**TEXT, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {
        **TEXT,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "inkling2": {"text_config": INKLING2, "vision_config": {"text_hidden_size": HIDDEN}},
    "inkling2_text": INKLING2,
    "inkling2_loop": {"text_config": INKLING2, "vision_config": {"text_hidden_size": HIDDEN}},
    "inkling2_loop_text": INKLING2,
    "inkling_text": INKLING,
    "lfm2_moe": {**TEXT, "layer_types": ["conv", "full_attention"]},
    "mistral4": {**TEXT, **LATENT, "num_key_value_heads": 4},
    "modernbert-decoder": {**TEXT, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "xlnet": {"d_model": HIDDEN, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": VOCABULARY},
    "xlstm": {"hidden_size": HIDDEN, "num_blocks": 2, "num_heads": 4, "vocab_size": VOCABULARY, "chunk_size": 16},
    "zamba": {**ZAMBA, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"]},
    "zamba2": {**ZAMBA, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"]},
}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Make every size in `config` and its sub-configs small, in place, and return it."""
    given = GIVEN.get(getattr(config, "model_type", ""), {})
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name not in given:
            new = _size(name, value)
            if new != value:
                _set(config, name, new)
    if not given:
        _lists(config)
    _token_ids(config)
    _attention(config)
    for name, value in FIXES.get(getattr(config, "model_type", ""), {}).items():
        _set(config, name, value)
    return config


def _size(name: str, value: int) -> int:
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else value
    return value


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError):
        return  # a field that others decide


def _lists(config: PretrainedConfig) -> None:
    """Cut lists that have one entry a layer, keeping one layer of every type."""
    count = getattr(config, "num_hidden_layers", None)
    types = getattr(config, "layer_types", None)
    if not isinstance(count, int):
        return
    if isinstance(types, (list, tuple)) and types:
        kinds = list(dict.fromkeys(types))
        chosen = (kinds * LAYERS)[: max(count, len(kinds))]
        _set(config, "num_hidden_layers", len(chosen))
        _set(config, "layer_types", chosen)
        count = len(chosen)
    for name, value in list(vars(config).items()):
        if name != "layer_types" and isinstance(value, (list, tuple)) and len(value) > count and _per_layer(name):
            _set(config, name, type(value)(value[:count]))


def _per_layer(name: str) -> bool:
    return bool(re.search(r"layer|pattern|per_block|_types$", name)) and "token" not in name


def _token_ids(config: PretrainedConfig) -> None:
    """Bring special tokens into the small vocabulary, each on an id of its own."""
    following = VOCABULARY - 1
    for name, value in sorted(vars(config).items()):
        if re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= VOCABULARY - 24:
            _set(config, name, following)
            following -= 1


def _attention(config: PretrainedConfig) -> None:
    """Sizes of heads that must fit one another."""
    given = vars(config)  # some configs refuse to be asked for what differs from layer to layer
    if given.get("kv_lora_rank"):
        _set(config, "num_key_value_heads", given.get("num_attention_heads", 4))
    if "head_dim" in given and given["head_dim"] is None:
        _set(config, "head_dim", 16)
    parameters = given.get("rope_parameters") or {}
    factor = given.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1
    rotary = int(16 * factor) // 2
    third = rotary // 4
    for values in (vars(config).get("rope_scaling"), vars(config).get("rope_parameters")):
        for inner in (values, *(values.values() if isinstance(values, dict) else ())):
            if isinstance(inner, dict) and (inner is values or "mrope_section" in inner):
                inner["mrope_section"] = [third, third, rotary - 2 * third]


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of `model_type`, small."""
    return shrink(CONFIG_MAPPING[model_type](**GIVEN.get(model_type, {})))


def tiny_model(model_type: str, task: str) -> nn.Module:
    """A random model in float32; task: "causal-lm" or "image-text-to-text"."""
    config = tiny_config(model_type)
    if task == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    torch.manual_seed(0)
    model: nn.Module = AUTO[task].from_config(config, dtype=torch.float32)
    spread(model)
    return model.eval()


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give weights the size that keeps activations alive, so that a wrong layer shows in the logits."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, min(1.0, 1.5 / parameter.shape[-1] ** 0.5))


def architectures() -> list[tuple[str, str]]:
    """(model type, task) of everything in the two mappings; a type that has the same class in both is listed once."""
    causal, image = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    listed = [(name, "causal-lm") for name in causal]
    return listed + [(name, "image-text-to-text") for name in image if causal.get(name) != image[name]]
