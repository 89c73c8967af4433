"""The text that Python itself carries: enough of it, the same every time, and nothing imported for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from auto_round.calibrate import builtin as module
from auto_round.calibrate.builtin import builtin
from auto_round.calibrate.documents import Corpus
from auto_round.calibrate.spec import DatasetSpec
from auto_round.errors import CalibrationError


def test_this_python_has_enough_text_for_the_default_recipe(heard: Any) -> None:
    loaded = set(sys.modules)
    corpus = builtin(DatasetSpec("builtin"), 128 * 2048, heard)
    assert not {name for name in set(sys.modules) - loaded if name.split(".")[0] in sys.stdlib_module_names}
    documents = [str(document) for document in corpus.documents]
    # 4 characters a token, and a third more than is needed.
    assert sum(map(len, documents)) > 128 * 2048 * 4 * 4 / 3
    assert "source" not in corpus.title
    assert any("compound statement" in document for document in documents)
    assert not any(line.lstrip().startswith(">>>") for document in documents[100:] for line in document.splitlines())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of a few modules, in place of the real one."""
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'a': {'topic a ' * 20_000!r}}}\n")
    prose = "Does what it says, and says what it does, at some length.  " * 2
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tests").mkdir()
    (tmp_path / "json" / "tests" / "test_it.py").write_text(f'"""{prose}"""\n')
    (tmp_path / "json" / "__init__.py").write_text(
        f'"""{prose}\n\n>>> example()\noutput\n\nAfter."""\n'
        f'class Thing:\n    """{prose}"""\n    def short(self):\n        """Short."""\n'
        f'def function():\n    """{prose}"""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "string.py").write_text(f'"""{prose}"""\n' + "x = 1\n" * 30_000)
    (tmp_path / "not_of_python.py").write_text(f'"""{prose}"""\n')
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(module.sys, "stdlib_module_names", frozenset({"json", "string", "broken", "test"}))
    return tmp_path


def load(tokens: int, heard: Any) -> Corpus:
    return builtin(DatasetSpec("builtin"), tokens, heard)


def test_topics_then_docstrings_without_examples_by_module(library: Path, heard: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_LEAST_CHARACTERS", 1000)
    topic, json, string = map(str, load(10, heard).documents)
    assert topic.startswith("topic a")
    assert [line for line in json.splitlines() if len(line) < 40 and line] == ["After.", "Thing", "function"]
    assert "output" not in json
    assert string.startswith("Does what it says")


def test_source_code_follows_when_more_is_wanted(library: Path, heard: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_LEAST_CHARACTERS", 1000)
    corpus = load(50_000, heard)
    assert "source code" in corpus.title
    assert any("x = 1\nx = 1" in str(document) for document in corpus.documents)


def test_a_python_without_documentation_is_an_error(library: Path, heard: Any) -> None:
    with pytest.raises(CalibrationError, match=r"has only 16.... characters of documentation"):
        load(10, heard)
    (library / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(CalibrationError, match=r"has only ... characters"):
        load(10, heard)


def test_the_same_every_time(library: Path, heard: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_LEAST_CHARACTERS", 1000)
    assert load(50_000, heard) == load(50_000, heard)
