r"""The mini-language that names calibration sets, and its one parser.

    dataset = set *("," set)
    set     = name *(":" option)
    option  = "split=" a *("+" b) | "num=" N | "concat" ["=" bool] | "apply_chat_template" ["=" bool]
            | "system_prompt=" text

A backslash takes the meaning from the comma, colon or backslash behind it; before any other character it is itself.
The colon of a Windows drive (one letter at the start of a set, then ":\" or ":/") needs no escape. Spaces around
names and options are dropped, spaces inside them and all those of a system prompt are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from auto_round.errors import CalibrationError
from auto_round.registry import did_you_mean

_SPECIAL = "\\,:"
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class DatasetSpec:
    """One calibration set.

    name: a named set, a hub data set or a file. splits: which splits of a hub data set; () is "train".
    num: samples to take from this set; None is an even share of what the others leave.
    concat: True packs all documents together, False never does, None does where whole documents are too few.
    apply_chat_template: put documents through the tokenizer's chat template, under `system_prompt` if there is one.
    """

    name: str
    splits: tuple[str, ...] = ()
    num: int | None = None
    concat: bool | None = None
    apply_chat_template: bool = False
    system_prompt: str | None = None

    def __str__(self) -> str:
        """The set as the mini-language has it."""
        options = {
            "split": "+".join(self.splits) or None,
            "num": self.num,
            "concat": self.concat,
            "apply_chat_template": self.apply_chat_template or None,
            "system_prompt": self.system_prompt,
        }
        written = [f"{key}={escape(str(value))}" for key, value in options.items() if value is not None]
        return ":".join([escape(self.name), *written])


@dataclass(frozen=True)
class _Field:
    """A name or option with its escapes resolved, and the character (from 1) of the dataset at which it starts."""

    text: str
    at: int


def escape(text: str) -> str:
    r"""Return `text` such that the parser reads it as it is.

    >>> print(escape("my data, v2.json"))
    my data\, v2.json
    """
    return re.sub(r"([\\,:])", r"\\\1", text)


def parse_dataset(text: str) -> tuple[DatasetSpec, ...]:
    """Read the mini-language; raise CalibrationError naming the option and its place.

    >>> parse_dataset("pile-10k:num=96, notes.jsonl:concat")[1]
    DatasetSpec(name='notes.jsonl', splits=(), num=None, concat=True, apply_chat_template=False, system_prompt=None)
    """
    return tuple(_read_set(fields, text) for fields in _split(text))


def _split(text: str) -> list[list[_Field]]:
    """Cut at every comma and colon that is not escaped: sets, and in each its name and options."""
    sets: list[list[_Field]] = [[]]
    letters: list[str] = []
    start = here = 0
    while here < len(text):
        char = text[here]
        if char == "\\" and text[here + 1 : here + 2] in tuple(_SPECIAL):
            letters.append(text[here + 1])
            here += 2
            continue
        if char == "," or (char == ":" and not (not sets[-1] and _is_drive(text, start, here))):
            sets[-1].append(_Field("".join(letters), start + 1))
            letters, start = [], here + 1
            if char == ",":
                sets.append([])
        else:
            letters.append(char)
        here += 1
    sets[-1].append(_Field("".join(letters), start + 1))
    return sets


def _is_drive(text: str, start: int, colon: int) -> bool:
    # No option starts with a slash, so a letter in front of ":\" or ":/" can be nothing but a drive.
    return bool(re.fullmatch(r"\s*[A-Za-z]", text[start:colon])) and text[colon + 1 : colon + 2] in ("\\", "/")


def _read_set(fields: list[_Field], text: str) -> DatasetSpec:
    name, options = fields[0].text.strip(), fields[1:]
    if not name:
        raise CalibrationError(f"a set without a name at character {fields[0].at} of the dataset {text!r}")
    values: dict[str, object] = {}
    for option in options:
        key, equals, value = option.text.partition("=")
        key = key.strip()
        where = f"option {key!r} at character {option.at} of the dataset {text!r}"
        if key not in _OPTIONS:
            advice = did_you_mean(key, list(_OPTIONS))
            raise CalibrationError(rf"unknown {where}. {advice} A colon that belongs to a name is written \:")
        keyword, read = _OPTIONS[key]
        if keyword in values:
            raise CalibrationError(f"{where} is given twice")
        values[keyword] = read(value if equals else None, where)
    if values.get("system_prompt") is not None:
        if values.get("apply_chat_template") is False:
            raise CalibrationError(f"set {name!r} has a system_prompt, which needs apply_chat_template")
        values["apply_chat_template"] = True
    return DatasetSpec(name, **values)  # type: ignore[arg-type]


def _bool(value: str | None, where: str) -> bool:
    if value is None:
        return True
    if value.strip().lower() not in _BOOLS:
        raise CalibrationError(f"{where} is {value!r}; write true or false")
    return _BOOLS[value.strip().lower()]


def _num(value: str | None, where: str) -> int:
    if value is None or not re.fullmatch(r"\s*0*[1-9][0-9]*\s*", value):
        raise CalibrationError(f"{where} is {value!r}; write a number of samples such as num=64")
    return int(value)


def _splits(value: str | None, where: str) -> tuple[str, ...]:
    splits = tuple(part.strip() for part in (value or "").split("+"))
    if not all(splits):
        raise CalibrationError(f"{where} is {value!r}; write split names such as split=train+test")
    return splits


def _prompt(value: str | None, where: str) -> str:
    if not value:
        raise CalibrationError(f"{where} is empty; write system_prompt=You are helpful.")
    return value


_OPTIONS: dict[str, tuple[str, Callable[[str | None, str], object]]] = {
    "split": ("splits", _splits),
    "num": ("num", _num),
    "concat": ("concat", _bool),
    "apply_chat_template": ("apply_chat_template", _bool),
    "system_prompt": ("system_prompt", _prompt),
}
