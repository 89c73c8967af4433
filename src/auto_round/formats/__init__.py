"""Checkpoint formats: how codes, scales and zero points lie in files. One format a file, writer beside reader."""

from auto_round.errors import FormatError
from auto_round.formats.base import Format
from auto_round.registry import Registry

FORMATS: Registry[Format] = Registry(
    "format",
    {"auto_round": "auto_round.formats.auto_round:FORMAT"},
    FormatError,
)
