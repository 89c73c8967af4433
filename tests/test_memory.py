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
tuner = AutoRound(sys.argv[1], iters=1, nsamples=4, seqlen=32, batch_size=4, device="cpu", compute_dtype="float32",
                  dataset=["the quick brown fox. " * 8] * 4)
if sys.argv[2:]:
    print(tuner.quantize_and_save(sys.argv[2], enable_check=False).peak_rss_bytes)
else:
    memory = tuner.plan("nowhere").memory  # once: its trials of the machine leave memory behind
    print(max(memory[stage] for stage in ("loading", "tuning", "saving")))
"""


def child(*words: object) -> int:
    """What a process of its own prints: the plan's trials of the machine take memory too."""
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


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
    return child(folder), child(folder, folder / "out")


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
