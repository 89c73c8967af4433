"""Rules that cannot be read are refused with the place of the fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.cli.layers import read_layer_config
from auto_round.errors import SpecError


def test_the_caret_stands_under_the_fault() -> None:
    with pytest.raises(SpecError) as caught:
        read_layer_config("{\"a\": {'bits': 8}}")
    headline, line, caret, hint = str(caught.value).splitlines()
    assert "line 1, column 8" in headline
    assert line[caret.index("^")] == "'"
    assert "double quotes" in hint


def test_the_caret_stays_under_the_fault_in_long_lines_of_files(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text('{\n"' + "x" * 200 + '": True}')
    with pytest.raises(SpecError) as caught:
        read_layer_config(str(file))
    headline, line, caret, hint = str(caught.value).splitlines()
    assert str(file) in headline
    assert "line 2" in headline
    assert line[caret.index("^") :].startswith("True")
    assert max(len(line), len(caret)) <= 72
    assert "true" in hint


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1, column 2"),
        ("[1]", "JSON list"),
        ('{"a": "keep", "a": "W8A16"}', "'a' stands there twice"),
        ("no_such_file.json", "No such file"),
        ("down_proj: 8", "neither JSON nor a file"),
    ],
)
def test_what_is_refused(text: str, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        read_layer_config(text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not a text file"):
        read_layer_config(str(file))
