"""Environments of their own for the software that has to open what we write, made once and kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

# llama.cpp without its tools, its image readers and OpenMP, whose barriers stall on machines that do other work too.
LLAMA_CPP = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF", "SKBUILD_BUILD_TARGETS": "llama;llama-common"}

CACHE = Path.home() / ".cache" / "auto-round-tests"


def client(
    name: str, packages: Sequence[str], *, dependencies: bool = False, building: Mapping[str, str] | None = None
) -> Path:
    """Return the Python of an environment that has `packages` beside everything this environment has.

    What is installed here (torch, transformers) is seen from there, so only the client itself is downloaded; its own
    version of a package comes first. This project is not seen: an editable install is not a folder on the path.
    dependencies: also install what the packages ask for, where this environment does not satisfy it.
    building: variables of the environment for packages that are compiled on installation.
    """
    here = sysconfig.get_path("purelib")
    settings = sorted((building or {}).items())
    key = hashlib.sha256(repr((sys.version, sorted(packages), dependencies, *settings)).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        _see(folder, here)
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    _see(folder, here)
    words = [str(python), "-m", "pip", "install", "--quiet", *([] if dependencies else ["--no-deps"]), *packages]
    subprocess.run(words, check=True, env={**os.environ, **dict(settings)})
    (folder / "ready").touch()
    return python


def _see(folder: Path, packages: str) -> None:
    """Let the environment see `packages`, those of the environment that asks now: each checkout has its own."""
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(packages + "\n", encoding="utf-8")


def llama_cpp() -> Path:
    """Return the Python of an environment with llama.cpp in it; building it takes some minutes once."""
    return client("llama-cpp", ["llama-cpp-python==0.3.36", "diskcache"], building=LLAMA_CPP)


def run(python: Path, code: str, *arguments: object) -> str:
    """Run `code` there and return what it prints; a failure shows the end of its standard error."""
    words = [str(python), "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
