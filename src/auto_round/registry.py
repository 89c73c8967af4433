"""One registry for everything that is looked up by name: formats, backends, data sets."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from auto_round.errors import AutoRoundError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a sentence with the nearest of `known` to `name`, or the whole list when nothing is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."


class Registry(Generic[T]):
    """Names to objects, each imported when it is first asked for.

    >>> formats = Registry[object]("format", {"auto_round": "auto_round.formats.auto_round:AutoRoundFormat"})
    >>> list(formats)
    ['auto_round']
    """

    def __init__(self, kind: str, targets: dict[str, str], error: type[AutoRoundError] = AutoRoundError) -> None:
        self.kind = kind
        self._targets = dict(targets)
        self._error = error

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __getitem__(self, name: str) -> T:
        """Import and return the object called `name`.

        Raises the registry's error, with the nearest names if it is unknown, or naming a package that it needs.
        """
        if name not in self._targets:
            raise self._error(f"unknown {self.kind} {name!r}. {did_you_mean(name, list(self._targets))}")
        path, _, attribute = self._targets[name].partition(":")
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            package = (error.name or __name__).partition(".")[0]
            if package == __name__.partition(".")[0]:
                raise
            raise self._error(
                f"{self.kind} {name!r} needs the package {package}, which is not installed: pip install {package}"
            ) from None
        return cast(T, getattr(module, attribute))

    def is_usable(self, name: str) -> bool:
        """True when the packages that the object called `name` needs are installed."""
        try:
            self[name]
        except self._error:
            return False
        return True

    def usable(self) -> list[str]:
        """Names of those whose packages are installed."""
        return [name for name in self if self.is_usable(name)]
