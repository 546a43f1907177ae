"""In the guest: run the tests of a plan, until all have run or the time is over."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from tests.vm import _cases

PLAN = Path("/vm/plan.json")
EVERY = 100


def main() -> None:
    """Run the tests; print what fails, and in the last line how many passed."""
    plan = json.loads(PLAN.read_text())
    until = time.monotonic() + plan["seconds"]
    counts = Counter[str]()
    for test, outcome in _cases.outcomes(plan["tests"]):
        word = {_cases.PASSED: "passed", _cases.SKIPPED: "skipped"}.get(outcome, "failed")
        counts[word] += 1
        if word == "failed":
            print(f"{test}: {outcome}", flush=True)
        if not counts.total() % EVERY:
            print(f"{counts.total()} of {len(plan['tests'])}", flush=True)
        if time.monotonic() > until:
            break
    left = len(plan["tests"]) - counts.total()
    words = [f"{counts[word]} {word}" for word in ("passed", "failed", "skipped")]
    print("ended: " + ", ".join(words) + (f", {left} not run" if left else ""), flush=True)


if __name__ == "__main__":
    main()
