"""Tuning holds one block at a time: peak memory does not grow with the depth of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_llama, tiny_tokenizer

CHILD = """
import sys
from auto_round import AutoRound
report = AutoRound(sys.argv[1], iters=1, nsamples=4, seqlen=32, batch_size=4, dataset=["the quick brown fox. " * 8] * 4,
                   device="cpu", compute_dtype="float32").quantize_and_save(sys.argv[2])
print(report.peak_rss_bytes)
"""


def peak_bytes(folder: Path, blocks: int) -> int:
    """Peak RSS of a process of its own that tunes blocks of 50 MB in float32."""
    tiny_llama(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    words = [sys.executable, "-c", CHILD, str(folder), str(folder / "out")]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.slow
def test_four_times_the_blocks_take_the_same_memory(tmp_path: Path) -> None:
    few, many = peak_bytes(tmp_path / "few", 3), peak_bytes(tmp_path / "many", 12)
    assert many < 1.1 * few, f"{few / 1e6:.0f} MB with 3 blocks, {many / 1e6:.0f} MB with 12"
