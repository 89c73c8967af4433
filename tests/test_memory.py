"""Tuning holds one block at a time: peak memory does not grow with the depth of the model, and is what was foreseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_llama, tiny_tokenizer

CHILD = """
import sys
from auto_round import AutoRound
settings = dict(iters=1, nsamples=4, seqlen=32, batch_size=4, dataset=["the quick brown fox. " * 8] * 4, device="cpu",
                compute_dtype="float32")
foreseen = AutoRound(sys.argv[1], **settings).plan(sys.argv[2]).peak_bytes
report = AutoRound(sys.argv[1], **settings).quantize_and_save(sys.argv[2], enable_check=False)
print(foreseen, report.peak_rss_bytes)
"""


def peaks(folder: Path, blocks: int, inner: int = 3072) -> tuple[int, int]:
    """Peak RSS, foreseen and measured, of a process of its own that tunes blocks of 4 + 3 * inner / 1024 Mi weights."""
    tiny_llama(
        hidden_size=1024,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    words = [sys.executable, "-c", CHILD, str(folder), str(folder / "out")]
    foreseen, measured = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return int(foreseen), int(measured)


@pytest.mark.slow
def test_four_times_the_blocks_take_the_same_memory(tmp_path: Path) -> None:
    (_, few), (_, many) = peaks(tmp_path / "few", 3), peaks(tmp_path / "many", 12)
    assert many < 1.1 * few, f"{few / 1e6:.0f} MB with 3 blocks, {many / 1e6:.0f} MB with 12"


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1024, 6144])
def test_peak_memory_is_foreseen(tmp_path: Path, inner: int) -> None:
    """With 6144 the blocks' own memory is as much again as what the libraries hold."""
    foreseen, measured = peaks(tmp_path / "model", 2, inner)
    assert 0.85 < foreseen / measured < 1.15, f"{foreseen / 1e6:.0f} MB foreseen, {measured / 1e6:.0f} MB measured"
