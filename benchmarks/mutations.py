"""A thousand damaged or lying inputs: none may end in a traceback, hang, or touch a file outside its output.

    python -m benchmarks.mutations [--count 1000]     (from the repository's root)

Writes benchmarks/results/mutations.json: how many ended how, by kind of mutation, and every one that is wrong.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.test_mutations import attempts, model_in

RESULT = Path(__file__).parent / "results" / "mutations.json"
WORDS = {0: "sound result", 2: "clear error", 3: "bad result, said so"}


def main() -> None:
    """Run them all and keep the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=10_000, help="first seed; the suite's begin at 0")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        results = attempts(model_in(place / "model"), place, list(range(given.first, given.first + given.count)))
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        kinds[str(result["change"]).partition(":")[0]][WORDS.get(int(str(result["code"])), "broken")] += 1
    record = {
        "mutants": len(results),
        "wrong": [result for result in results if result["wrong"]],
        "ended": Counter(WORDS.get(int(str(result["code"])), "broken") for result in results),
        "by_kind": kinds,
        "longest_seconds": max(float(str(result["seconds"])) for result in results),
        "seconds": round(time.monotonic() - begin),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
