"""Local files and records become documents, or an error says which file, row and column is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from auto_round.calibrate import documents
from auto_round.calibrate.documents import Document, from_records, read_file
from auto_round.errors import CalibrationError
from auto_round.runtime.events import LogListener

TEXTS = ["one text", "zwei Wörter", "three"]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"


def read(path: Path) -> Sequence[Document]:
    corpus = read_file(str(path), LogListener())
    assert corpus.title == str(path)
    return corpus.documents


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
        ("a.JSON", json.dumps(RECORDS, ensure_ascii=False, indent=2)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", LINES),
    ],
)
def test_json(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read(tmp_path / name) == TEXTS


def test_one_record_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "alone"}\n')
    assert read(tmp_path / "a.json") == ["alone"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(CalibrationError, match=r"b.parquet has no column .*; its columns are id, body"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(CalibrationError, match=r"cannot read .*c.parquet"):
        read(tmp_path / "c.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(CalibrationError, match=r"pip install auto-round\[data\]"):
        read(tmp_path / "a.parquet")


def test_running_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = "\n".join(f"Paragraph {n}. " + "word " * 300 + "\n" for n in range(60))
    text = paragraphs + "one line\n" * 10_000
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert "".join(map(str, pieces)) == text
    assert len(pieces) > 4
    assert all(str(piece).startswith("Paragraph") and str(piece).endswith("\n\n") for piece in pieces[:3])
    assert all(len(piece) < 40_000 for piece in pieces)


def test_messages_in_the_shapes_that_data_sets_have() -> None:
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}, plain[1]]
    for column, messages in (("messages", plain), ("conversations", shared), ("prompt", parts)):
        assert list(from_records([{"id": 1, column: messages}], "here")) == [tuple(plain)]
    assert list(from_records([{"prompt": "text"}, {"prompt": None}], "here")) == ["text"]


def test_messages_that_only_call_tools_say_nothing() -> None:
    asked = {"role": "user", "content": "Rain?"}
    calls: dict[str, Any] = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    for call in (calls, {**calls, "content": None}):
        (found,) = from_records([{"messages": [asked, call]}], "here")
        assert found == (asked, {"role": "assistant", "content": ""})
    for call in ({"content": None, "tool_calls": []}, {"role": "user", "text": "Rain?"}):
        with pytest.raises(CalibrationError, match="row 1 of here has a message without role and content"):
            list(from_records([{"messages": [call]}], "here"))


def test_the_first_record_decides_on_the_column() -> None:
    rows = [{"prompt": "this"}, {"prompt": "and this", "text": "not this"}]
    assert list(from_records(rows, "here")) == ["this", "and this"]


def test_text_goes_before_messages() -> None:
    assert list(from_records([{"messages": [], "text": "this"}], "here")) == ["this"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 of .*a.jsonl is not JSON"),
        ("a.json", "[1, 2", "a.json is not JSON"),
        ("a.json", '{"train":\n []}', "a.json holds one dict"),
        ("a.json", '"text"', "a.json holds one str"),
        ("a.json", "[1]", "row 1 of .*a.json is a int; expected text"),
        ("a.jsonl", '{"body": "x", "id": 2}', "a.jsonl has no column text, .*; its columns are body, id"),
        ("a.jsonl", '{"messages": ["x"]}', "row 1 of .* has a message without role and content: 'x'"),
        ("a.csv", "text", "cannot read .*a.csv: a calibration file ends in .json"),
    ],
)
def test_errors_name_the_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read(tmp_path / name)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no file .*gone.json"):
        read(tmp_path / "gone.json")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match=r"cannot read .*a.txt"):
        read(tmp_path / "a.txt")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "STREAMED_DOCUMENTS", 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_of_large_files_of_lines_the_first_are_read(name: str, tmp_path: Path, narrow: None, heard: Any) -> None:
    path = tmp_path / name
    path.write_text(LINES + "no JSON, which is not read\n" * 10)
    corpus = read_file(str(path), heard)
    assert corpus.documents == TEXTS[:2]
    assert corpus.title == f"{path}, first 2 documents"
    assert heard.notes == [f"{path} is large: its first 2 documents are used"]


def test_of_a_large_table_the_first_rows_are_read(tmp_path: Path, narrow: None, heard: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [None, *TEXTS]}), path)
    corpus = read_file(str(path), heard)
    assert (corpus.documents, corpus.title) == (TEXTS[:2], f"{path}, first 2 documents")
    assert len(heard.notes) == 1


def test_of_large_running_text_the_start_is_read(tmp_path: Path, narrow: None, heard: Any) -> None:
    path, text = tmp_path / "a.txt", "one line " * 20_000
    path.write_text(text)
    corpus = read_file(str(path), heard)
    assert len(corpus.documents) == 2
    start = "".join(map(str, corpus.documents))
    assert text.startswith(start)
    assert len(start) < len(text)
    assert corpus.title.endswith("first 2 documents")


def test_one_large_list_is_read_whole_and_said_to_be(tmp_path: Path, narrow: None, heard: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff " + json.dumps(RECORDS, indent=2), encoding="utf-8")
    corpus = read_file(str(path), heard)
    assert (corpus.documents, corpus.title) == (TEXTS, str(path))
    assert "is one large list, which is read whole" in heard.notes[0]


def test_large_files_of_few_documents_are_used_whole(tmp_path: Path, narrow: None, heard: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 100}))
    assert read_file(str(path), heard).title == str(path)
    assert heard.notes == []
