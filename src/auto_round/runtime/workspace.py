"""The hidden folder beside an output in which a run keeps what it has done, and the lock on it.

.NAME.auto-round/lock       held (flock) while a process works on it; who it is stands inside
                 job.json   what the work is for: two jobs never mix in one folder
                 blocks/    the journal, one file for every finished block
                 activations/  what enters and leaves blocks, when it is not to be in memory
                 source/    a loaded model or a GGUF file, unpacked
                 given/     the tokenizer or processor that was given
                 written/   calibration text that the model wrote itself
                 output/    the output while it is put together; renamed to NAME when it is whole
                 replaced/  a former NAME on its way out
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import OutputError
from auto_round.runtime.durable import sync, sync_tree, write_durably

WRITTEN = "written"
ACTIVATIONS = "activations"
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Workspace:
    """A locked work folder; made by `workspace`."""

    folder: Path
    target: Path

    @property
    def blocks(self) -> Path:
        """Where the journal lies."""
        return self.folder / "blocks"

    @property
    def staging(self) -> Path:
        """Where the output is put together."""
        return self.folder / "output"

    def recorded(self) -> dict[str, Any] | None:
        """What the work in this folder is for, or None when there is none yet."""
        try:
            facts: dict[str, Any] = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return facts

    def claim(self, facts: Facts, *, overwrite: bool) -> None:
        """Make this the folder of the job that `facts` (JSON values) describe, or find that it is already.

        Work of another job is discarded when `overwrite`, but for text that the model wrote; else see `check`.
        """
        if not overwrite:
            self.check(facts)
        if not self.is_of(facts):
            self._discard_codes()
            write_durably(self.folder / "job.json", json.dumps(facts, indent=1).encode())

    def check(self, facts: Facts) -> None:
        """Raise OutputError when another job's work is kept here, saying in what the two differ."""
        recorded = self.recorded()
        if recorded is not None and not self.is_of(facts):
            raise OutputError(
                f"{self.target}: an unfinished run of another job is kept in {self.folder}. It differs in:\n"
                + "\n".join(f"  {line}" for line in differences(recorded, _plain(facts)))
                + "\nFinish it with its own command, choose another output_dir, or discard it with --overwrite."
            )

    def forget(self, facts: Facts) -> None:
        """Remove what is left of a job that is done, not another's work."""
        if self.is_of(facts):
            self.discard()
        elif self.recorded() is None:
            self._discard_codes()

    def is_of(self, facts: Facts) -> bool:
        """True when the work that is kept here is that of the job `facts`."""
        return self.recorded() == _plain(facts)

    def discard(self) -> None:
        """Forget the work that is kept here."""
        self._discard_codes()
        shutil.rmtree(self.folder / WRITTEN, ignore_errors=True)

    def _discard_codes(self) -> None:
        for leftover in (self.blocks, self.staging, self.folder / ACTIVATIONS):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.folder / "job.json").unlink(missing_ok=True)

    def publish(self) -> None:
        """Put the finished `staging` in the target's place, whole, and forget the work."""
        sync_tree(self.staging)
        if self.target.exists():
            self.target.rename(self.folder / "replaced")
        self.staging.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder)


def check_output(output_dir: str | Path, source: str | Path) -> Path:
    """Return the output folder as `check_place` does, its parent made; raises OutputError when that cannot be."""
    target = check_place(output_dir, source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be created: {error.strerror}") from None
    return target


def check_place(output_dir: str | Path, source: str | Path) -> Path:
    """Return the output folder, links followed, as an absolute path.

    source: what the work begins with; a path when it lies on this disk. Raises OutputError when the folder cannot be
    put in place, or holds the source, which an overwritten output would take with it.
    """
    target = Path(output_dir).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; choose another output_dir")
    if os.path.ismount(target):
        raise OutputError(
            f"{target}: is a mount point, whose place a finished folder cannot take; choose a folder inside it as "
            f"output_dir, such as {target / 'quantised'}"
        )
    origin = Path(source).expanduser().resolve()
    if origin.exists() and target in (origin, *origin.parents):
        raise OutputError(f"{target}: holds {source}, which is to be read; choose another output_dir")
    return target


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError when `target` holds anything and may not be replaced."""
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target}: is not empty; choose another output_dir, or pass overwrite (--overwrite)")


def work_folder(target: Path) -> Path:
    """The work folder of the output folder `target`."""
    return target.with_name(f".{target.name}.auto-round")


@contextmanager
def workspace(target: Path) -> Iterator[Workspace]:
    """Lock the work folder of `target`, made when it is not there; removed at the end when no work is kept in it.

    Text that the model wrote stays also without a finished block, and then belongs to no job: the next may use it.
    Raises OutputError when another process holds it. A process that dies lets go of its lock, so none can be stale.
    """
    folder = work_folder(target)
    handle = _locked(folder)
    try:
        _restore_replaced(folder, target)
        yield Workspace(folder, target)
    finally:
        if folder.is_dir() and not any(folder.glob("blocks/*.safetensors")):
            _clear(folder)
        os.close(handle)


def _locked(folder: Path) -> int:
    file = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise OutputError(
                f"{folder}: {holder} is at work on this output; wait for it, or choose another output_dir"
            ) from None
        # The holder before us may have removed the folder after we opened its file: then lock the new one.
        if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
            break
        os.close(handle)
    os.ftruncate(handle, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} (since {started})".encode())
    return handle


def _clear(folder: Path) -> None:
    """Remove the work folder; when text is kept in it, all but that and the lock."""
    if not any(folder.glob(f"{WRITTEN}/*.state")):
        shutil.rmtree(folder)
        return
    for item in folder.iterdir():
        if item.is_dir() and item.name != WRITTEN:
            shutil.rmtree(item)
        elif item.is_file() and item.name != "lock":
            item.unlink()


def _restore_replaced(folder: Path, target: Path) -> None:
    """Undo half an exchange: a former output was moved away and its successor had not come yet."""
    replaced = folder / "replaced"
    if replaced.is_dir():
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


def _plain(facts: Facts) -> dict[str, Any]:
    """As they are read back from JSON: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def differences(recorded: Facts, wanted: Facts, limit: int = 6) -> list[str]:
    """One line for each entry in which two jobs differ, at most `limit` and a count of the rest."""
    before, after = _flat(recorded), _flat(wanted)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    lines = [f"{name}: {_shown(before.get(name))} there, {_shown(after.get(name))} here" for name in names[:limit]]
    return lines + ([f"and {len(names) - limit} more"] if len(names) > limit else [])


def _flat(facts: Facts, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name} "))
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."
