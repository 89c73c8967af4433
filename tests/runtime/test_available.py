"""The memory that a container leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.runtime.memory import available_bytes


@pytest.mark.parametrize(
    ("limit", "used", "stat", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_cached_files_count_as_free(tmp_path: Path, limit: str, used: str, stat: str, prefix: str) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("900000\n")
    assert available_bytes(tmp_path) == 100_000
    (tmp_path / stat).write_text(f"anon 5\n{prefix}inactive_file 500000\n{prefix}active_file 100000\nslab 7\n")
    assert available_bytes(tmp_path) == 700_000


def test_no_limit_leaves_what_the_system_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    assert available_bytes(tmp_path) > 10**8
