"""How much memory this process may use."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

# Of the control group this process is in, in version 2 and version 1 of their file system: its limit, its use, and
# the file and keys that tell how much of the use are cached files, which the kernel drops when memory is wanted.
GROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can still be used: what the system has free or can free, and what a container's limit leaves.

    groups: where control groups are mounted.
    """
    left = [_system_bytes()]
    for limit_name, used_name, stat_name, cached in GROUPS:
        limit, used = _number(groups / limit_name), _number(groups / used_name)
        if limit is not None and used is not None:
            left.append(limit - max(used - _sum(groups / stat_name, cached), 0))
    return max(min(left), 0)


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _sum(file: Path, keys: Collection[str]) -> int:
    """Of the values of `keys` in lines of "key value"; 0 where the file is not there."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0
    return sum(int(value) for key, value in lines if key in keys)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
