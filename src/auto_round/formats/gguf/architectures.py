"""Architectures of llama.cpp: names of tensors, what is done to them on the way, and the keys that describe the model.

llama.cpp rotates neighbouring pairs of a head's values in some architectures ("permute"), where transformers rotates
value j with value j + head/2. For these, rows of the query and key weights change places: in a head of size h, new row
2j + s is old row s * h/2 + j. Gemma's norms multiply by w + 1, which is what the file holds ("norm_plus_one").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from auto_round.errors import FormatError
from auto_round.registry import did_you_mean
from auto_round.source.checkpoint import Checkpoint

HEAD = "lm_head.weight"
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """One row of the table below.

    fused: query, key and value are one Linear, gate and up another. period: every how many layers the pattern of
    special layers repeats, 0 for none. fixed: keys of config.json that no file holds, with the value they must have.
    """

    arch: MODEL_ARCH
    permute: bool = False
    norm_plus_one: bool = False
    rope_dimension: bool = False
    fused: bool = False
    period: int = 0
    fixed: tuple[tuple[str, Any], ...] = ()


EXPERTS_IN_ALL: tuple[tuple[str, Any], ...] = (("mlp_only_layers", []), ("decoder_sparse_step", 1))
# Likewise of a yarn rotation: llama.cpp has keys for the first two, and reads them in other architectures only.
YARN = (("beta_fast", 32), ("beta_slow", 1), ("truncate", True))

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(MODEL_ARCH.LLAMA, permute=True, rope_dimension=True),
        "mistral": Architecture(MODEL_ARCH.LLAMA, permute=True, rope_dimension=True),
        "mixtral": Architecture(MODEL_ARCH.LLAMA, permute=True, rope_dimension=True),
        "smollm3": Architecture(MODEL_ARCH.SMOLLM3, permute=True, rope_dimension=True, period=4),
        "qwen2": Architecture(MODEL_ARCH.QWEN2),
        "qwen2_moe": Architecture(MODEL_ARCH.QWEN2MOE, fixed=(*EXPERTS_IN_ALL, ("norm_topk_prob", False))),
        "qwen3": Architecture(MODEL_ARCH.QWEN3),
        "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE, fixed=(*EXPERTS_IN_ALL, ("norm_topk_prob", True))),
        "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_plus_one=True, period=2),
        "gemma3_text": Architecture(
            MODEL_ARCH.GEMMA3, norm_plus_one=True, period=6, fixed=(("use_bidirectional_attention", False),)
        ),
        "phi3": Architecture(MODEL_ARCH.PHI3, rope_dimension=True, fused=True),
    }
)


class Model:
    """A model as llama.cpp sees it, from its config.json; raises FormatError when it has no place there.

    checkpoint: its tensors, if they are to be written; a head stored with values of its own is not tied, as in
    transformers, whatever the config says.
    """

    def __init__(self, raw: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> None:
        kind = str(raw.get("model_type"))
        if kind not in ARCHITECTURES:
            raise FormatError(
                f"GGUF: architecture {kind!r} is not written here. {did_you_mean(kind, list(ARCHITECTURES))}"
            )
        self.architecture = ARCHITECTURES[kind]
        # for_model fills in what a config.json leaves to the class, and brings old rope keys into today's form.
        self.config: PretrainedConfig = AutoConfig.for_model(
            kind, **{k: v for k, v in raw.items() if k != "model_type"}
        )
        self.name = MODEL_ARCH_NAMES[self.architecture.arch]
        self.layers = int(self.config.num_hidden_layers)
        self.heads = int(self.config.num_attention_heads)
        self.key_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)
        self.experts = int(
            getattr(self.config, "num_local_experts", None) or getattr(self.config, "num_experts", 0) or 0
        )
        self.tied = bool(self.config.tie_word_embeddings) and (checkpoint is None or not _has_head(checkpoint))
        self._names = get_tensor_name_map(self.architecture.arch, self.layers)
        self._check_fixed()
        self._check_pattern()
        self._check_scale()

    def _check_fixed(self) -> None:
        """llama.cpp computes some things in one way only; a model that does otherwise would be another one there."""
        rope = _rope(self.config)
        stated = [(key, getattr(self.config, key, None), value) for key, value in self.architecture.fixed]
        if rope.get("rope_type") == "yarn":
            given = {key: value for key, value in rope.items() if value is not None}
            stated += [(f"rope_parameters.{key}", given.get(key, value), value) for key, value in YARN]
        for key, found, value in stated:
            if found != value and (found or value):  # nothing and an empty list say the same
                raise FormatError(
                    f"GGUF: llama.cpp runs {self.name} with {key}={value!r} only, this model has {found!r}"
                )

    def _check_scale(self) -> None:
        """llama.cpp scales Gemma's attention by the head's size, but in the largest by width over heads."""
        scalar = getattr(self.config, "query_pre_attn_scalar", None)
        largest = {"gemma2": 46, "gemma3": 62}.get(self.name) == self.layers
        expected = self.config.hidden_size // self.heads if largest else self.head_dim
        if scalar is not None and scalar != expected:
            raise FormatError(f"GGUF: llama.cpp scales attention of {self.name} by {expected}, this model by {scalar}")

    def _check_pattern(self) -> None:
        """llama.cpp knows which layers are local or have no rotation; a model of another pattern would babble."""
        config, period = self.config, self.architecture.period
        expected = [(i + 1) % period != 0 for i in range(self.layers)] if period else []
        if not period:
            return
        rotated = getattr(config, "no_rope_layers", None)  # smollm3: 1 where there is a rotation
        found = [bool(r) for r in rotated] if rotated else [kind == "sliding_attention" for kind in config.layer_types]
        if found != expected:
            raise FormatError(
                f"GGUF: llama.cpp takes every {period}th layer of {self.name} as special, this model differs"
            )

    def tensor_name(self, stored: str) -> str | None:
        """GGUF name of a tensor of the checkpoint; None for what is left out; FormatError if it has no place."""
        if stored.endswith(".rotary_emb.inv_freq") or (self.tied and stored == HEAD):
            return None
        # transformers' tree calls mlp what Mixtral's checkpoints, and gguf's table, call block_sparse_moe.
        plain = EXPERT.sub(".experts.", stored).replace(".mlp.experts.w", ".block_sparse_moe.experts.w")
        for candidate in (plain, "model." + plain):
            name: str | None = self._names.get_name(candidate, (".weight", ".bias"))
            if name is not None:
                return name
        raise FormatError(f"GGUF: tensor {stored!r} has no place in llama.cpp's architecture {self.name!r}")

    def row_order(self, name: str) -> Tensor | None:
        """Old row of each new row of the GGUF tensor `name`; None when rows stay."""
        part = name.rsplit(".", 2)[-2]
        heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(part)
        if not self.architecture.permute or heads is None:
            return None
        return torch.arange(heads * self.head_dim).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def is_shifted_norm(self, name: str) -> bool:
        """True for norms whose weight is stored plus one."""
        return self.architecture.norm_plus_one and name.endswith("norm.weight")

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that the checkpoint does not hold: frequencies of scaled rotations, float32."""
        rope = _rope(self.config)
        if rope.get("rope_type") == "llama3":
            return {"rope_freqs.weight": _llama3_divisors(rope, self.head_dim)}
        if rope.get("rope_type") == "longrope":
            return {f"rope_factors_{k}.weight": torch.tensor(rope[f"{k}_factor"]).float() for k in ("long", "short")}
        return {}

    def describe(self, writer: GGUFWriter) -> None:
        """Write the model's keys."""
        config = self.config
        writer.add_block_count(self.layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        _describe_rope(writer, self)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
        for attribute, add in _optional(writer).items():
            value = getattr(config, attribute, None)
            if value is not None:
                add(value)
        if self.name == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)
        elif self.architecture.period and getattr(config, "sliding_window", None) and self.name != "smollm3":
            writer.add_sliding_window(config.sliding_window)


def _has_head(checkpoint: Checkpoint) -> bool:
    """True when head and embedding are stored with different values, as where adapters were merged."""
    stored = next((name for name in checkpoint if name.endswith("embed_tokens.weight")), None)
    if stored is None or HEAD not in checkpoint:
        return False
    embedding = checkpoint.tensor(stored)
    return not torch.equal(checkpoint.tensor(HEAD).to(embedding.dtype), embedding)


def _optional(writer: GGUFWriter) -> dict[str, Callable[[Any], None]]:
    """Keys for attributes that some configs have."""
    return {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
    }


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Rotation of the layers with full attention."""
    rope = dict(config.rope_parameters)
    return dict(rope.get("full_attention", rope))


def _describe_rope(writer: GGUFWriter, model: Model) -> None:
    config, rope = model.config, _rope(model.config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = config.rope_parameters.get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if model.architecture.rope_dimension:
        share = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(model.head_dim * share))
    kind = rope.get("rope_type", "default")
    original = float(
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(original))
            if (stretch := _yarn_attention(rope)) != 1:
                writer.add_rope_scaling_attn_factors(stretch)
    elif kind == "longrope":
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        )
    elif kind not in ("default", "llama3"):
        raise FormatError(f"GGUF: llama.cpp has no rotation scaled like {kind!r}")


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """What the attention of a yarn rotation is scaled by, over 0.1 ln(factor) + 1, which llama.cpp does by itself."""

    def scale(share: float) -> float:
        return 0.1 * share * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"]) / scale(1)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"]) / scale(1)
    return 1.0


def _llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Divisor of each frequency: 1 for short waves, the factor for long ones, a blend between (Llama 3.1)."""
    frequency = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wave = 2 * math.pi / frequency
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth: Tensor = ((original / wave - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
