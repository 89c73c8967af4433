"""Codes of n bits to 32-bit words and back.

Layout: 32 consecutive codes of b bits are a little-endian stream of b words; code i lies at bit i*b, so word i*b // 32,
shift i*b % 32. For 2, 4 and 8 bits nothing straddles a word; for 3 bits it is the stream that GPTQ files hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_length(count: int, bits: int) -> int:
    """Words that hold `count` codes: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    codes: (..., n), any integer dtype, values 0 .. 2^bits-1. Returns (..., ceil(n*bits/32)) int32; unused bits are 0.
    """
    count = codes.shape[-1]
    blocks = -(-count // 32)
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, blocks * 32 - count))
    padded = padded.reshape(*codes.shape[:-1], blocks, 32)
    words = padded.new_zeros(*codes.shape[:-1], blocks, bits)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= padded[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - shift)
    return words.reshape(*codes.shape[:-1], blocks * bits)[..., : packed_length(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: words (..., ceil(count*bits/32)) int32 -> codes (..., count) uint8."""
    blocks = -(-count // 32)
    padded = torch.nn.functional.pad(words, (0, blocks * bits - words.shape[-1]))
    padded = padded.reshape(*words.shape[:-1], blocks, bits)
    codes = torch.empty(*words.shape[:-1], blocks, 32, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = padded[..., word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            value = (value & ((1 << low) - 1)) | (padded[..., word + 1] << low)
        codes[..., i] = (value & mask).to(torch.uint8)
    return codes.reshape(*words.shape[:-1], blocks * 32)[..., :count].contiguous()
