"""Documents out of records and local files: plain text, or the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import CalibrationError

# Where data sets keep their text, in order of preference; the last three hold messages, or sometimes text.
COLUMNS = ("text", "messages", "conversations", "prompt")
SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
# ShareGPT's names for the roles that chat templates know.
_ROLES = {"human": "user", "gpt": "assistant"}
# A text file is cut into documents of this many characters or more, so that drawing can take from all of it.
_PIECE = 16384

Message = dict[str, str]
Document = str | tuple[Message, ...]


@dataclass(frozen=True)
class Corpus:
    """What a set holds, in a fixed order. title: what it is, for people."""

    documents: Sequence[Document]
    title: str


def read_file(path: Path) -> list[Document]:
    """Read a .json, .jsonl, .txt or .parquet file; raise CalibrationError naming file and line or column."""
    if path.suffix.lower() not in SUFFIXES:
        raise CalibrationError(f"cannot read {path}: a calibration file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from None
    if path.suffix.lower() == ".txt":
        return list(_pieces(text))
    return list(from_records(_json_rows(text, path), str(path)))


def from_records(rows: Iterable[Any], where: str) -> Iterator[Document]:
    """Yield the document of each row: a text, or a record with one of COLUMNS, the same in all rows."""
    column = None
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            column = column or find_column(list(row), where)
            row = row.get(column)
        if row is None:
            continue
        yield _document(row, f"row {number} of {where}")


def find_column(names: Sequence[str], where: str) -> str:
    """Return the column that holds the text; raise CalibrationError naming the columns there are."""
    for column in COLUMNS:
        if column in names:
            return column
    raise CalibrationError(f"{where} has no column {', '.join(COLUMNS)}; its columns are {', '.join(names)}")


def _document(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_message(message, where) for message in value)
    raise CalibrationError(f"{where} is a {type(value).__name__}; expected text or a list of messages")


def _message(value: Any, where: str) -> Message:
    if isinstance(value, dict):
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        if isinstance(content, list):
            # Multimodal records hold parts; only those of text mean anything to a language model.
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise CalibrationError(f"{where} has a message without role and content: {value!r:.80}")


def _json_rows(text: str, path: Path) -> list[Any]:
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            # Many a .json holds one record a line; only then is there more behind the first value.
            if error.msg != "Extra data":
                raise CalibrationError(f"{path} is not JSON: {error}") from None
        else:
            if isinstance(whole, list):
                return whole
            if "\n" in text.strip() or not isinstance(whole, dict):
                raise CalibrationError(f"{path} holds one {type(whole).__name__}; expected a list of texts or records")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CalibrationError(f"line {number} of {path} is not JSON: {error.msg}") from None
    return rows


def _read_parquet(path: Path) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path} needs pyarrow: pip install auto-round[data]") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = find_column(table.schema_arrow.names, str(path))
        rows = [row for batch in table.iter_batches(columns=[column]) for row in batch.to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from None
    return list(from_records(rows, str(path)))


def _pieces(text: str) -> Iterator[str]:
    """Cut running text at the end of a paragraph, or of a line where paragraphs do not end."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= 2 * _PIECE or (size >= _PIECE and not line.strip()):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
