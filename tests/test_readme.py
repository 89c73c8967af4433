"""What the README shows runs as it stands there, on a tiny model of the name it uses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
# The tiny model takes 64 tokens; the figures in the README's own commands would take minutes.
SHORT = ["--iters", "1", "--nsamples", "4", "--seqlen", "32", "--dataset", "builtin", "--device", "cpu", "--overwrite"]
SHORT_KEYWORDS = 'sym=True, iters=1, nsamples=4, seqlen=32, dataset="builtin", device="cpu")'


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_every_block_runs(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "Qwen2.5-Coder-0.5B")
    make, command = blocks("bash")
    assert [line.split("#")[0].split() for line in make.splitlines()] == [["make", "demo"], ["make", "test"]]
    words = command.split()
    assert words[0] == "auto-round"
    subprocess.run([sys.executable, "-m", "auto_round", *words[1:], *SHORT], cwd=tmp_path, check=True)
    tune, load = blocks("python")
    assert "sym=True)" in tune
    shutil.rmtree(tmp_path / "tmp_autoround")
    for script in (tune.replace("sym=True)", SHORT_KEYWORDS), load):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert done.stdout.strip()
