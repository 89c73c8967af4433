"""Reading ``--layer_config``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from auto_round.errors import SpecError


def read_layer_config(text: str) -> dict[str, Any]:
    """Read rules from JSON, or from the JSON file whose path `text` is.

    Raises SpecError that shows the place when the JSON is not valid, when it is not an object, or when the same layer
    pattern stands in it twice; also when the file is not there.
    """
    if text.lstrip().startswith(("{", "[")):
        return _parse(text, "--layer_config")
    path = Path(text).expanduser()
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise SpecError(
            f"--layer_config {text!r}: neither JSON nor a file that can be read ({error.strerror}). "
            'Write it like \'{"*.down_proj": {"bits": 8}}\''
        ) from None
    except UnicodeDecodeError:
        raise SpecError(f"--layer_config {path}: is not a text file in UTF-8") from None


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        rules = json.loads(text, object_pairs_hook=_unrepeated)
    except json.JSONDecodeError as error:
        raise SpecError(_pointed(text, origin, error)) from None
    if not isinstance(rules, dict):
        raise SpecError(f'{origin}: is a JSON {type(rules).__name__}; give an object: {{"layer": {{"bits": 8}}}}')
    return rules


def _pointed(text: str, origin: str, error: json.JSONDecodeError) -> str:
    """The error with the line it is in and a caret under the place."""
    line = text.splitlines()[error.lineno - 1] if text.splitlines()[error.lineno - 1 :] else ""
    begin = max(error.colno - 40, 0)
    shown = line[begin : begin + 72]
    lines = [f"{origin}: {error.msg} at line {error.lineno}, column {error.colno}", shown]
    lines.append(" " * (error.colno - 1 - begin) + "^")
    if "'" in shown:
        lines.append("JSON has double quotes, also around names.")
    elif any(word in shown for word in ("True", "False", "None")):
        lines.append("JSON writes true, false and null.")
    return "\n".join(lines)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise SpecError(
            f"--layer_config: {repeated[0]!r} stands there twice; later rules win, so order them by pattern"
        )
    return dict(pairs)
