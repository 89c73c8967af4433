"""Damaged and lying inputs: a clear error or a sound result, whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_llama, tiny_tokenizer


def model_in(folder: Path) -> Path:
    """A tiny model in two shards with an index."""
    tiny_llama().save_pretrained(folder, max_shard_size="600KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def attempts(model: Path, scratch: Path, seeds: list[int]) -> list[dict[str, Any]]:
    asked = json.dumps({"model": str(model), "scratch": str(scratch), "seeds": seeds})
    words = [sys.executable, "-m", "tests.mutations"]
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 150), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_mutant_breaks_through(tmp_path: Path, seeds: range) -> None:
    results = attempts(model_in(tmp_path / "model"), tmp_path / "scratch", list(seeds))
    assert [result for result in results if result["wrong"]] == []
    codes = [result["code"] for result in results]
    assert codes.count(2) > len(seeds) / 3
    assert codes.count(0) > len(seeds) / 20
