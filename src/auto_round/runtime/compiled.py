"""C code of the package: built with it where there is a compiler, loaded with ctypes, absent without harm."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from torch import Tensor

PATHS = ("plain C", "AVX2", "AVX-512")  # what `paths_of_this_cpu` of compiled.h counts
# Not by its name: that of the package index is another's.
REINSTALL = "pip install --force-reinstall --no-cache-dir --no-deps . (in the folder it was installed from)"


class NotCompiledError(Exception):
    """Why there is no such library: what happened, and in `fix` what to do before REINSTALL."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.fix = fix


def load_library(folder: Path, stem: str, version: str, abi: int) -> ctypes.CDLL:
    """Load the library `stem` beside the code in `folder`, whose function `version` must return `abi`.

    Raises NotCompiledError when it was not built, cannot be loaded or is of another version.
    """
    file = next((f for suffix in EXTENSION_SUFFIXES if (f := folder / f"{stem}{suffix}").exists()), None)
    if file is None:
        fix = "install a C compiler (gcc or clang), then build it anew"
        raise NotCompiledError("the native kernel was not built when auto-round was installed", fix)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NotCompiledError(f"the native kernel cannot be loaded ({error})", "build it anew") from None
    if getattr(library, version)() != abi:
        raise NotCompiledError("the native kernel was built from another version", "build it anew")
    return library


def library_if_built(folder: Path, stem: str, version: str, abi: int) -> ctypes.CDLL | None:
    """As `load_library`, or None where that raises: what the library does comes from torch then."""
    try:
        return load_library(folder, stem, version, abi)
    except NotCompiledError:
        return None


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's values, as ctypes takes it."""
    return None if tensor is None else tensor.data_ptr()
