"""What the benchmarks of quality share: the calibration tokens, and how figures are shown and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def calibration(file: Path, tokenizer: Any, nsamples: int, seqlen: int) -> list[list[int]]:
    """The first `nsamples` texts of a jsonl with at least `seqlen` tokens, each cut to that."""
    samples: list[list[int]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"][:seqlen]
        if len(ids) == seqlen:
            samples.append(ids)
        if len(samples) == nsamples:
            return samples
    raise SystemExit(f"{file}: only {len(samples)} texts of {seqlen} tokens")


def show(result: dict[str, Any], table: str, file: Path | None) -> None:
    """Print the table, and keep the figures as JSON when a file is given."""
    print(table)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
