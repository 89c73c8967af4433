"""What is taken of a model's repository, and of a tokenizer that is given."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer

from auto_round.errors import SourceError
from auto_round.source import opening
from auto_round.source.opening import open_source


class Hub:
    """Stands for the hub: a folder, of which what a pattern allows is downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, set[str]()

    def __call__(self, title: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        for file in self.folder.rglob("*"):
            name = str(file.relative_to(self.folder))
            wanted = any(fnmatchcase(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatchcase(name, pattern) for pattern in ignore_patterns or []):
                self.taken.add(name)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    tiny_llama().save_pretrained(tmp_path / "repository")
    tiny_tokenizer().save_pretrained(tmp_path / "repository")
    found = Hub(tmp_path / "repository")
    monkeypatch.setattr(opening, "snapshot_download", found)
    return found


def test_weights_that_transformers_does_not_read_are_left_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    others = {"consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors"}
    (hub.folder / "original").mkdir()
    for name in others:
        (hub.folder / name).touch()
    open_source("org/model", None, tmp_path / "scratch")
    assert "model.safetensors" in hub.taken
    assert "tokenizer.json" in hub.taken
    assert not others & hub.taken


def test_a_quantised_model_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path) -> None:
    file = hub.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(SourceError, match="org/model: is quantised already"):
        open_source("org/model", None, tmp_path / "scratch")
    assert hub.taken == {"config.json"}


def names(source: Any) -> dict[str, Path]:
    return {file.name: file for file in source.extra_files}


def test_no_file_of_another_tokenizer_stays_beside_the_given_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "alpha"}))
    (tmp_path / "m" / "notes.txt").touch()
    mine = tiny_tokenizer()
    source = open_source(tmp_path / "m", mine, tmp_path / "scratch")
    assert "special_tokens_map.json" not in names(source)
    assert {"notes.txt", "tokenizer.json"} <= names(source).keys()
    (tmp_path / "out").mkdir()
    for file in source.extra_files:
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == mine.eos_token
    assert names(open_source(tmp_path / "m", None, tmp_path / "scratch")).keys() > {"special_tokens_map.json"}


def test_a_tokenizer_leaves_the_processors_template(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    for name in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / "m" / name).write_text("{}")
    kept = names(open_source(tmp_path / "m", tiny_tokenizer(), tmp_path / "scratch"))
    assert "chat_template.json" in kept  # transformers reads it for processors alone
    assert "chat_template.jinja" not in kept


def test_a_processors_template_goes_before_the_tokenizers(tmp_path: Path) -> None:
    class Processor:
        chat_template = "of the processor"

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "processor_config.json").write_text("{}")

    tiny_llama().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "chat_template.json").write_text("{}")
    mine = tiny_tokenizer()
    mine.chat_template = "of the tokenizer"
    source = open_source(tmp_path / "m", mine, tmp_path / "scratch", processor=Processor())
    assert names(source)["chat_template.jinja"].read_text() == "of the processor"
    assert "tokenizer.json" in names(source)
    assert "chat_template.json" not in names(source)


def test_what_calls_leave_in_a_tokenizer_is_not_saved(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m")
    mine = tiny_tokenizer()
    before = names(open_source(tmp_path / "m", mine, tmp_path / "a"))["tokenizer.json"].read_bytes()
    mine("alpha beta", truncation=True, max_length=3)
    after = names(open_source(tmp_path / "m", mine, tmp_path / "b"))["tokenizer.json"].read_bytes()
    assert after == before
