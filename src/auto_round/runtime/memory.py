"""How much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

# The limit and the use of the control group this process is in, in version 2 and version 1 of their file system.
GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available_bytes() -> int:
    """Memory that can still be used: what the system has free or can free, and what a container's limit leaves."""
    left = [_system_bytes()]
    for limit, used in GROUPS:
        limits = [_number(Path("/sys/fs/cgroup") / name) for name in (limit, used)]
        if limits[0] is not None and limits[1] is not None:
            left.append(limits[0] - limits[1])
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


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
