"""What the benchmarks of quality share: the calibration tokens, and how figures are shown and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def calibration(file: Path, tokenizer: Any, nsamples: int, seqlen: int) -> list[list[int]]:
    """`nsamples` pieces of `seqlen` tokens of a jsonl: the first of each text, then the second of each, and so on."""
    texts = [tokenizer(json.loads(line)["text"])["input_ids"] for line in file.read_text(encoding="utf-8").splitlines()]
    samples: list[list[int]] = []
    for begin in range(0, max(map(len, texts), default=0), seqlen):
        for ids in texts:
            if len(ids) >= begin + seqlen:
                samples.append(ids[begin : begin + seqlen])
            if len(samples) == nsamples:
                return samples
    raise SystemExit(f"{file}: only {len(samples)} pieces of {seqlen} tokens")


def show(result: dict[str, Any], table: str, file: Path | None) -> None:
    """Print the table, and keep the figures as JSON when a file is given."""
    print(table)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
