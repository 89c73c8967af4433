"""A user's mistakes: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

QUICK = ("--iters", "1", "--nsamples", "2", "--seqlen", "16", "--group_size", "32", "--device", "cpu", "--quiet")


def refused(folder: Path, *words: str) -> str:
    """Standard error of a run that has to fail; checks the exit code and that the folder is as it was."""
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "auto_round", *words, "--output_dir", str(folder / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before
    return " ".join(done.stderr.split())


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def test_an_empty_data_set(copied: Path) -> None:
    (copied.parent / "empty.txt").write_text("")
    assert "empty.txt" in refused(copied.parent, str(copied), "--dataset", str(copied.parent / "empty.txt"), *QUICK)


@pytest.mark.parametrize("recipe", ["rtn", "tuned"])
def test_a_nan_weight(copied: Path, recipe: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    start = ("--start", "plain", "--iters", "0") if recipe == "rtn" else ()
    assert "model.layers.1" in refused(copied.parent, str(copied), "--dataset", "builtin", *QUICK, *start)


def test_a_truncated_checkpoint(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in refused(copied.parent, str(copied), "--dataset", "builtin", *QUICK)
