"""A thousand damaged or lying inputs: none may end in a traceback, hang, or touch a file outside its output.

    python -m benchmarks.mutations [--count 1000] [--first 10000] [--more]     (from the repository's root)

Writes benchmarks/results/mutations.json: how many ended how, by kind of mutation, and every one that is wrong. With
--more the seeds from --first on are added to the kept result, whose last they must follow.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.test_mutations import attempts, model_in

RESULT = Path(__file__).parent / "results" / "mutations.json"
WORDS = {0: "sound result", 2: "clear error", 3: "bad result, said so"}


def record(results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What is kept of some attempts."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        kinds[result["change"].partition(":")[0]][WORDS.get(result["code"], "broken")] += 1
    return {
        "mutants": len(results),
        "seeds": [results[0]["seed"], results[-1]["seed"]],
        "wrong": [result for result in results if result["wrong"]],
        "ended": Counter(WORDS.get(result["code"], "broken") for result in results),
        "by_kind": kinds,
        "longest_seconds": max(result["seconds"] for result in results),
        "seconds": round(seconds),
    }


def joined(kept: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two records as one, the second's seeds following the first's."""
    assert kept["seeds"][1] + 1 == more["seeds"][0]
    kinds = sorted({*kept["by_kind"], *more["by_kind"]})
    sums = {name: kept[name] + more[name] for name in ("mutants", "wrong", "seconds")}
    return {
        **sums,
        "seeds": [kept["seeds"][0], more["seeds"][1]],
        "ended": Counter(kept["ended"]) + Counter(more["ended"]),
        "by_kind": {k: Counter(kept["by_kind"].get(k)) + Counter(more["by_kind"].get(k)) for k in kinds},
        "longest_seconds": max(kept["longest_seconds"], more["longest_seconds"]),
    }


def main() -> None:
    """Run them all and keep the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=10_000, help="first seed; the suite's begin at 0")
    parser.add_argument("--more", action="store_true", help="add to the kept result")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        results = attempts(model_in(place / "model"), place, list(range(given.first, given.first + given.count)))
    found = record(results, time.monotonic() - begin)
    if given.more:
        found = joined(json.loads(RESULT.read_text()), found)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print({name: found[name] for name in ("mutants", "ended", "wrong", "longest_seconds", "seconds")})


if __name__ == "__main__":
    main()
