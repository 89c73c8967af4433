"""The sets that a name can mean: those of the registry, files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

# httpx's base class, which huggingface_hub takes from one of two packages; its own errors are OSErrors besides.
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from auto_round.calibrate.builtin import builtin
from auto_round.calibrate.documents import (
    STREAMED_DOCUMENTS,
    SUFFIXES,
    WHOLE_BYTES,
    Corpus,
    Document,
    from_records,
    read_file,
)
from auto_round.calibrate.spec import DatasetSpec
from auto_round.errors import CalibrationError
from auto_round.registry import Registry, did_you_mean
from auto_round.runtime.events import Listener

PILE = "NeelNanda/pile-10k"
# The set that has no documents: the model makes its tokens.
SELF = "self"

Loader = Callable[[DatasetSpec, int, Listener], Corpus]
SETS: Registry[Loader] = Registry(
    "calibration set",
    {
        "auto": "auto_round.calibrate.corpora:auto",
        "builtin": "auto_round.calibrate.builtin:builtin",
        "pile-10k": "auto_round.calibrate.corpora:pile",
    },
    CalibrationError,
)


class _UnavailableError(CalibrationError):
    """The set exists as far as is known, but cannot be had here and now."""


def load(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    """Return the documents that `spec` names; `tokens` says about how many tokens are wanted of them."""
    try:
        return _loader(spec)(spec, tokens, listener)
    except _UnavailableError as error:
        raise CalibrationError(f"{error}; the set builtin needs no network") from error


def _loader(spec: DatasetSpec) -> Loader:
    name = spec.name
    is_file = name.lower().endswith(SUFFIXES) or Path(name).exists()
    if spec.splits and (name == "builtin" or (is_file and name not in SETS)):
        raise CalibrationError(f"{name} has no splits, only data sets of the hub have; leave split= out")
    if name in SETS:
        return SETS[name]
    if is_file:
        return _file
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return hub
    if PureWindowsPath(name).parent != PureWindowsPath("."):
        raise CalibrationError(f"there is no file {name}; a calibration file ends in {', '.join(SUFFIXES)}")
    raise CalibrationError(
        f"unknown calibration set {name!r}. {did_you_mean(name, [*SETS, SELF])} A hub data set is written owner/name, "
        f"a file with its ending ({', '.join(SUFFIXES)})"
    )


def _file(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    return read_file(spec.name, listener)


def auto(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    """The default: pile-10k if it can be had, else builtin, with a warning."""
    try:
        _check_reachable()
        return pile(spec, tokens, listener)
    except _UnavailableError as error:
        listener.warn(
            f"calibrating on builtin, the documentation that Python carries, because {error}. Text like that which "
            "the model will read gives a better result: name it with dataset (a file, a hub data set or self); "
            "dataset builtin says that this is meant"
        )
    return builtin(spec, tokens, listener)


def set_behind_auto(title: str) -> str:
    """The name of the set that "auto" stood for, from the title of what it gave; "auto" when it gave no such text."""
    known = {"builtin (": "builtin", f"{PILE} (": "pile-10k"}
    return next((name for start, name in known.items() if title.startswith(start)), "auto")


def pile(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    """The first 10,000 documents of The Pile, whole in the cache after their first use."""
    return _from_hub(PILE, spec.splits, listener, whole=True)


def hub(spec: DatasetSpec, tokens: int, listener: Listener) -> Corpus:
    """A data set of the hub; of a large one, its first documents."""
    return _from_hub(spec.name, spec.splits, listener, whole=spec.name == PILE)


def _from_hub(name: str, splits: tuple[str, ...], listener: Listener, *, whole: bool) -> Corpus:
    datasets = _datasets(name)
    splits = splits or ("train",)
    title = f"{name} ({'+'.join(splits)})"
    try:
        if not whole:
            # A large one, or one of unknown size, is not downloaded: its start is read.
            size = datasets.load_dataset_builder(name).info.download_size
            whole = size is not None and size <= WHOLE_BYTES
        documents: list[Document] = []
        for split in splits:
            rows = datasets.load_dataset(name, split=split, streaming=not whole)
            taken = itertools.islice(rows, None if whole else STREAMED_DOCUMENTS)
            documents += from_records(taken, title)
    except (OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise _UnavailableError(f"{name} cannot be had: {_first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        # What `datasets` raises for a split or configuration that is not there and for sets that are programs.
        raise CalibrationError(f"{name} cannot be read: {_first_line(error)}") from error
    if not whole and len(documents) >= STREAMED_DOCUMENTS:
        title += f", first {STREAMED_DOCUMENTS} documents of a split"
        listener.note(f"{name} is large or of unknown size: its first {STREAMED_DOCUMENTS} documents are used")
    return Corpus(documents, title)


def _check_reachable() -> None:
    """Fail at once where `datasets` would try again and again for half a minute."""
    datasets = _datasets(PILE)
    if Path(datasets.config.HF_DATASETS_CACHE, PILE.replace("/", "___")).is_dir():
        return
    try:
        HfApi().dataset_info(PILE, timeout=10)
    except (OSError, HTTPError) as error:
        raise _UnavailableError(f"{PILE} cannot be had: {_first_line(error)}") from error


def _datasets(name: str) -> Any:
    try:
        # A folder called datasets can be imported too, but has no such module.
        import datasets.exceptions
    except ImportError:
        raise _UnavailableError(f"{name} needs the package datasets (pip install auto-round[data])") from None
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
