"""Documents out of records and local files: plain text, or the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

# Where data sets keep their text, in order of preference; the last three hold messages, or sometimes text.
COLUMNS = ("text", "messages", "conversations", "prompt")
SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
# ShareGPT's names for the roles that chat templates know.
_ROLES = {"human": "user", "gpt": "assistant"}
# A message that has one of these and says nothing is one that only calls tools, as OpenAI writes them.
_SILENT = ("content", "value", "tool_calls")
# Of a file or a data set of the hub above this many bytes only the first documents are read.
WHOLE_BYTES = 2**30
STREAMED_DOCUMENTS = 10_000
# Rows of a parquet file that are in memory at once.
_ROWS = 1024
# A text file is cut into documents of this many characters or more, so that drawing can take from all of it.
_PIECE = 16384

Message = dict[str, str]
Document = str | tuple[Message, ...]


@dataclass(frozen=True)
class Corpus:
    """What a set holds, in a fixed order. title: what it is, for people."""

    documents: Sequence[Document]
    title: str


def read_file(name: str, listener: Listener) -> Corpus:
    """Read a .json, .jsonl, .txt or .parquet file; of one above WHOLE_BYTES the first STREAMED_DOCUMENTS documents.

    A .json file that is one list is always read whole, which takes several times its size of memory.
    Raises CalibrationError naming file and line or column.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CalibrationError(f"cannot read {path}: a calibration file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    try:
        large = path.stat().st_size > WHOLE_BYTES
        if large and suffix == ".json" and _is_list(path):
            listener.note(
                f"{path} is one large list, which is read whole and takes several times its size of memory; of a "
                f".jsonl file the first {STREAMED_DOCUMENTS} documents are used"
            )
            large = False
        limit = STREAMED_DOCUMENTS if large else None
        if suffix == ".parquet":
            documents = list(islice(from_records(_parquet_rows(path), str(path)), limit))
        else:
            with path.open(encoding="utf-8-sig") as file:
                documents = list(islice(_read_text(file, path, whole=not large), limit))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from None
    if limit is None or len(documents) < limit:
        return Corpus(documents, name)
    listener.note(f"{path} is large: its first {limit} documents are used")
    return Corpus(documents, f"{name}, first {limit} documents")


def _read_text(file: TextIO, path: Path, *, whole: bool) -> Iterator[Document]:
    """The documents of a file of text; whole: it may be read at once."""
    if path.suffix.lower() == ".txt":
        # One line may be all of a large file.
        return _pieces(file.read().splitlines(keepends=True) if whole else iter(lambda: file.readline(_PIECE), ""))
    rows = _json_rows(file.read(), path) if whole and path.suffix.lower() == ".json" else _json_lines(file, path)
    return from_records(rows, str(path))


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
        if content is None and not value.keys().isdisjoint(_SILENT):
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise CalibrationError(f"{where} has a message without role and content: {value!r:.80}")


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_rows(text: str, path: Path) -> Iterable[Any]:
    """The rows of a .json file: those of one list, or one a line."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # Many a .json holds one record a line; only then is there more behind the first value.
        if error.msg != "Extra data":
            raise CalibrationError(f"{path} is not JSON: {error}") from None
        return _json_lines(text.split("\n"), path)
    if isinstance(whole, list):
        return whole
    if "\n" in text.strip() or not isinstance(whole, dict):
        raise CalibrationError(f"{path} holds one {type(whole).__name__}; expected a list of texts or records")
    return [whole]


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"line {number} of {path} is not JSON: {error.msg}") from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path} needs pyarrow: pip install auto-round[data]") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = find_column(table.schema_arrow.names, str(path))
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from None


def _pieces(running: Iterable[str]) -> Iterator[str]:
    """Cut running text, given by lines, at the end of a paragraph, or of a line where paragraphs do not end."""
    lines: list[str] = []
    size = 0
    for line in running:
        lines.append(line)
        size += len(line)
        if size >= 2 * _PIECE or (size >= _PIECE and not line.strip()):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
