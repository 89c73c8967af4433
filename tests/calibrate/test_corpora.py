"""What a name means; the hub is played by a module, since tests have no network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from auto_round.calibrate import corpora
from auto_round.calibrate.documents import Corpus
from auto_round.calibrate.spec import parse_dataset
from auto_round.errors import CalibrationError


class Hub(ModuleType):
    """Stands in for the package datasets: `rows` by split, the download size, and the calls that were made."""

    def __init__(self, cache: Path) -> None:
        super().__init__("datasets")
        self.exceptions = ModuleType("datasets.exceptions")
        self.exceptions.DatasetsError = type("DatasetsError", (Exception,), {})  # type: ignore[attr-defined]
        self.config = SimpleNamespace(HF_DATASETS_CACHE=cache)
        self.rows: dict[str, list[dict[str, Any]]] = {"train": [{"text": "one"}, {"text": "two"}]}
        self.size: int | None = 1000
        self.error: Exception | None = None
        self.calls: list[tuple[str, str, bool]] = []

    def load_dataset_builder(self, name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(download_size=self.size))

    def load_dataset(self, name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.calls.append((name, split, streaming))
        if self.error:
            raise self.error
        if split not in self.rows:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.rows)}.')
        return iter(self.rows[split])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    module = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", module.exceptions)
    return module


@pytest.fixture
def no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture
def cheap_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "builtin", lambda spec, tokens, listener: Corpus(["docs"], f"builtin for {tokens}"))


def load(text: str, heard: Any) -> Corpus:
    (spec,) = parse_dataset(text)
    return corpora.load(spec, 100, heard)


def test_splits_of_a_hub_data_set(hub: Hub, heard: Any) -> None:
    hub.rows["test"] = [{"text": "three"}]
    corpus = load("owner/name:split=test+train", heard)
    assert corpus == Corpus(["three", "one", "two"], "owner/name (test+train)")
    assert hub.calls == [("owner/name", "test", False), ("owner/name", "train", False)]
    with pytest.raises(CalibrationError, match='owner/name cannot be read: Unknown split "nope"'):
        load("owner/name:split=nope", heard)


@pytest.mark.parametrize("size", [None, 10**12])
def test_a_large_data_set_is_read_from_its_start(hub: Hub, heard: Any, size: int | None) -> None:
    hub.size, hub.rows["train"] = size, [{"text": str(n)} for n in range(10_001)]
    corpus = load("owner/name", heard)
    assert hub.calls == [("owner/name", "train", True)]
    assert len(corpus.documents) == 10_000
    assert "first 10000" in corpus.title
    assert "first 10000 documents are used" in heard.notes[0]


def test_the_pile_is_always_whole(hub: Hub, heard: Any) -> None:
    hub.size = None
    for name in ("pile-10k", "NeelNanda/pile-10k"):
        assert load(name, heard).title == "NeelNanda/pile-10k (train)"
    assert hub.calls == [("NeelNanda/pile-10k", "train", False)] * 2


def test_columns_of_a_hub_data_set(hub: Hub, heard: Any) -> None:
    hub.rows["train"] = [{"id": 1, "body": "x"}]
    with pytest.raises(CalibrationError, match=r"owner/name \(train\) has no column .* are id, body"):
        load("owner/name", heard)


def test_a_hub_data_set_that_cannot_be_had_is_an_error_unless_auto_asked(hub: Hub, heard: Any) -> None:
    for error in (ConnectionError("no way"), OfflineModeIsEnabled("offline"), hub.exceptions.DatasetsError("gone")):
        hub.error = error
        with pytest.raises(CalibrationError, match=f"owner/name cannot be had: {error}; .* builtin needs no network"):
            load("owner/name", heard)
    assert heard.warnings == []


def test_without_the_package_the_error_names_the_extra(no_datasets: None, heard: Any) -> None:
    with pytest.raises(CalibrationError, match=r"owner/name needs the package datasets \(pip install auto-round\[data"):
        load("owner/name", heard)


def test_auto_takes_the_pile_when_it_is_there(hub: Hub, heard: Any, tmp_path: Path) -> None:
    (tmp_path / "NeelNanda___pile-10k").mkdir()  # in the cache: the network is not asked
    assert load("auto", heard) == Corpus(["one", "two"], "NeelNanda/pile-10k (train)")
    assert heard.warnings == []


def test_auto_falls_back_with_a_warning(hub: Hub, heard: Any, tmp_path: Path, cheap_builtin: None) -> None:
    (tmp_path / "NeelNanda___pile-10k").mkdir()
    hub.error = ConnectionError("no way")
    assert load("auto", heard).title == "builtin for 100"
    assert "because NeelNanda/pile-10k cannot be had: no way" in heard.warnings[0]
    assert "name it with dataset" in heard.warnings[0]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("builtin (documentation of CPython 3.11)", "builtin"),
        ("NeelNanda/pile-10k (train)", "pile-10k"),
        ("my.jsonl", "auto"),
        ("builtin.txt", "auto"),
        ("token ids that were given", "auto"),
    ],
)
def test_the_set_that_auto_stood_for_is_known_by_its_title(title: str, name: str) -> None:
    assert corpora.set_behind_auto(title) == name


def test_auto_without_the_package(no_datasets: None, heard: Any, cheap_builtin: None) -> None:
    assert load("auto", heard).title == "builtin for 100"
    assert "needs the package datasets" in heard.warnings[0]


def test_auto_asks_once_and_briefly_whether_the_hub_is_there(
    hub: Hub, heard: Any, cheap_builtin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def dataset_info(self: Any, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr(corpora.HfApi, "dataset_info", dataset_info)
    assert load("auto", heard).title == "builtin for 100"
    assert asked == [("NeelNanda/pile-10k", 10)]
    assert hub.calls == []
    assert "no route" in heard.warnings[0]


def test_auto_does_not_hide_other_errors(hub: Hub, heard: Any, tmp_path: Path, cheap_builtin: None) -> None:
    (tmp_path / "NeelNanda___pile-10k").mkdir()
    with pytest.raises(CalibrationError, match=r"Unknown split"):
        load("auto:split=nope", heard)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("builtni", r"unknown calibration set 'builtni'. Did you mean builtin\? .* owner/name"),
        ("selff", r"Did you mean self\?"),
        ("wikitext", "Known: auto, builtin, pile-10k, self"),
        ("./there/is/none", "there is no file ./there/is/none"),
        ("builtin:split=train", "builtin has no splits"),
        ("x.jsonl:split=train", "x.jsonl has no splits"),
    ],
)
def test_names_that_mean_nothing(text: str, message: str, heard: Any) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(text, heard)


def test_a_folder_is_no_file(heard: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"a calibration file ends in"):
        load(str(tmp_path), heard)
