"""Things looked up by name, some of which need packages that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.errors import FormatError
from auto_round.formats import FORMATS, open_coded
from auto_round.registry import Registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    """One entry that can be had, and one whose module imports a package that nobody has."""
    (tmp_path / "here_it_is.py").write_text("NUMBER = 3\n")
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Registry("number", {"here": "here_it_is:NUMBER", "more": "needs_more:NUMBER"}, FormatError)


def test_a_missing_package_is_named(registry: Registry[int]) -> None:
    assert registry["here"] == 3
    with pytest.raises(FormatError, match=r"'more' needs the package a_package_that_nobody_has.*pip install"):
        registry["more"]
    assert list(registry) == ["here", "more"]
    assert registry.usable() == ["here"]


def test_folders_open_without_the_packages_of_other_formats(
    registry: Registry[int], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in FORMATS if name.startswith("gguf")]:
        monkeypatch.setitem(FORMATS._targets, name, "needs_more:NUMBER")
    with pytest.raises(FormatError, match="not quantised"):
        open_coded(llama_folder, tmp_path)
    with pytest.raises(FormatError, match="needs the package a_package_that_nobody_has"):
        open_coded(tmp_path / "x.gguf", tmp_path)
