"""English text that every CPython carries: its language reference and the documentation inside its library.

Nothing is imported; the sources are parsed. Where a run needs more text than that, the library's source code follows.
"""

from __future__ import annotations

import ast
import platform
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from auto_round.calibrate.documents import Corpus
from auto_round.calibrate.spec import DatasetSpec
from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

# No text there: tables of characters, tests, demonstrations, a grammar tool, a cipher and a joke. `_topics` reads
# pydoc_data, where the language reference is.
_SKIPPED = {
    "__pycache__",
    "antigravity",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "this",
    "turtledemo",
}
# A docstring of fewer characters is a phrase, not text.
_SHORT = 80
# What a Python build without documentation has less than; a full one has ten times as much.
_LEAST_CHARACTERS = 200_000
# Characters in a token of English or code are 3 to 5; with this many there is enough after cutting and dropping.
_CHARACTERS_PER_TOKEN = 6


def builtin(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    """Return the documentation, and as much source code as is needed for about `tokens` tokens."""
    library = Path(sysconfig.get_path("stdlib"))
    files = list(_files(library))
    documents = [*_topics(library / "pydoc_data" / "topics.py"), *(prose for f in files if (prose := _prose(f)))]
    characters = sum(map(len, documents))
    if characters < _LEAST_CHARACTERS:
        raise CalibrationError(
            f"builtin: the Python in {library} has only {characters} characters of documentation in its library's "
            "sources; name a file or a data set instead"
        )
    version = f"CPython {platform.python_version()}"
    wanted = tokens * _CHARACTERS_PER_TOKEN
    if characters >= wanted:
        return Corpus(documents, f"builtin (documentation of {version})")
    # Not in the order of names, so that no package fills the set alone; the same for every seed and machine.
    random.Random(0).shuffle(files)
    for file in files:
        if characters >= wanted:
            break
        documents.append(_source(file))
        characters += len(documents[-1])
    return Corpus(documents, f"builtin (documentation and source code of {version})")


def _files(library: Path) -> Iterator[Path]:
    """Yield the library's modules by name, whatever the platform sorts first."""
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if (library / f"{name}.py").is_file():
            yield library / f"{name}.py"
        inside = (library / name).rglob("*.py")
        for file in sorted(inside, key=lambda path: path.relative_to(library).as_posix()):
            if not _SKIPPED.intersection(file.relative_to(library).parts):
                yield file


def _topics(file: Path) -> Iterator[str]:
    """Yield the language reference: the strings of the one dictionary in the module."""
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _prose(file: Path) -> str:
    """The docstrings of one module, each under the name it describes, without examples and their output."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(_parsed(file)) if isinstance(node, described)]
    parts = []
    for node in sorted(nodes, key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno):
        text = _without_examples(ast.get_docstring(node) or "")
        if len(text) >= _SHORT:
            parts.append(text if isinstance(node, ast.Module) else f"{node.name}\n{text}")
    return "\n\n".join(parts)


def _without_examples(text: str) -> str:
    kept, example = [], False
    for line in text.splitlines():
        # Output ends where a blank line stands.
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            kept.append(line.rstrip())
    return "\n".join(kept).strip()


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(_source(file))
    except SyntaxError:
        # Some modules hold bad syntax on purpose, for tools that must cope with it.
        return ast.Module([], [])


def _source(file: Path) -> str:
    try:
        with tokenize.open(file) as opened:
            return opened.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
