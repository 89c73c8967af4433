"""From typed words to a folder, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.test_record import a_report

from auto_round.cli.demo import measure
from auto_round.cli.dispatch import dispatch
from auto_round.report.record import RunReport, SavedFolder


def rounded(model: Path, output: Path, *flags: str) -> int:
    words = [str(model), "--output-dir", str(output), "--group_size", "32", "--device", "cpu", *flags]
    with pytest.raises(SystemExit) as stop:
        dispatch("auto-round-rtn", "rtn", words)
    return int(stop.value.code or 0)


def test_plain_rounding_writes_a_folder_and_prints_the_report(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rounded(llama_folder, tmp_path / "out", "--json", "--quiet", "--compute_dtype", "float32") == 0
    captured = capsys.readouterr()
    report = RunReport.from_json(captured.out)
    assert captured.err == ""
    assert report.folders[0].path == str(tmp_path / "out")
    assert (report.scheme, report.recipe["iters"], report.layers_quantised) == ("W4A16G32", 0, 14)
    assert (tmp_path / "out" / "auto_round.json").read_text() == report.to_json(measured=False)


def test_a_folder_in_use_is_left_alone_unless_told(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert rounded(llama_folder, tmp_path / "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert rounded(llama_folder, tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_demo_measures_folders_against_the_original(llama_folder: Path) -> None:
    report = a_report(folders=(SavedFolder("auto_round", str(llama_folder), 5),), bytes_after=5, bytes_before=9)
    rows, sentence = measure(llama_folder, report, report)
    assert [(row.label, row.bytes) for row in rows] == [("original", 9), ("plain rounding", 5), ("learned rounding", 5)]
    assert [row.comparison.kl_divergence for row in rows if row.comparison] == [0.0, 0.0]
    assert rows[0].perplexity == rows[1].perplexity > 1
    assert sentence
