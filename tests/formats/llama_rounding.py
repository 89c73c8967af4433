"""llama.cpp's arithmetic in torch: beside weights of some types its kernels round the inputs before they multiply.

The table of types in ggml-cpu.c (``vec_dot_type``) says to what; x are inputs of one token, q codes of 8 bits:

    weights               inputs   block   x' = d * q
    Q4_0, Q5_0, Q8_0      Q8_0     32      q = round(127 * x / max |x|), d = max |x| / 127 as float16
    Q4_1, Q5_1            Q8_1     32      the same; beside minimums the sum over the block, d * sum q as float16
    Q2_K .. Q6_K          Q8_K     256     q = round(-127 * x / x of largest |x|), d float32
    BF16, F16             the weights' dtype
    F32                   as they are
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from auto_round.formats.gguf.reader import GgufFile, read_parts
from auto_round.load import fused_of
from auto_round.qtensor import BlockTensor
from auto_round.source.fused import open_fused
from auto_round.spec.blocks import BlockScheme


def rounded_inputs(x: Tensor, kind: BlockScheme | torch.dtype) -> Tensor:
    """x: (..., in) float32, the inputs of a layer whose weights are in blocks or floats of `kind`; returns the same."""
    if isinstance(kind, torch.dtype):
        return x.to(kind).float()
    blocks = x.unflatten(-1, (-1, kind.size))
    if kind.two_level:
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        inverse = -127 / largest
        codes = (inverse * blocks).round().clamp(max=127)
        rounded = torch.where(largest == 0, 0.0, codes / inverse)
    else:
        largest = blocks.abs().amax(-1, keepdim=True)
        codes = (127 / largest * blocks).round()
        rounded = torch.where(largest == 0, 0.0, codes * (largest / 127).half().float())
    return rounded.flatten(-2)


def dequantised(source: Path, file: Path, *, rounding: bool) -> Any:
    """The model of `source` in float32 with the weights of a GGUF file, experts as Linears.

    rounding: round the inputs of each Linear as llama.cpp does beside weights of that type in the file.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    open_fused(model, fused_of(model), lambda layer: layer.weight)  # type: ignore[arg-type, return-value]
    # transformers' tree calls mlp what Mixtral's checkpoints call block_sparse_moe.
    parts = {name.replace("block_sparse_moe.", "mlp."): part for name, part in read_parts(GgufFile(file))}
    weights = {
        name: part.dequantize() if isinstance(part, BlockTensor) else part.float() for name, part in parts.items()
    }
    found = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    if rounding:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                own = parts.get(f"{name}.weight", parts["model.embed_tokens.weight"])
                _round_before(module, own.scheme if isinstance(own, BlockTensor) else own.dtype)
    return model


def _round_before(module: nn.Module, kind: BlockScheme | torch.dtype) -> None:
    module.register_forward_pre_hook(lambda _, args: (rounded_inputs(args[0], kind), *args[1:]))
