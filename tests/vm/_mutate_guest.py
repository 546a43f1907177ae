"""In the guest: find out which tests reach which mutants, and which tests notice them.

Results go to the console line by line, as JSON after a mark, because a mutant may end the guest at
any time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

from pyuffd.conformance._case import load
from pyuffd.conformance._kmsg import Kmsg
from tests.vm import _cases

PLAN = Path("/vm/plan.json")
MARK = "mutant: "
KNOBS = Path("/sys/kernel/debug/pyuffd")
# Quick tests that every healthy kernel passes.
CONTROL = ["UFFDIO_COPY.ok.page.anon", "UFFDIO_COPY.ok.page.hugetlb", "UFFDIO_COPY.ok.page.shmem"]
# Tests that affect the whole machine or take long: not run for each mutant.
LONG = ("stress", "starve", "memory-pressure", "swapoff", "migration", "transact", "small-vec")


def main() -> None:
    """Carry out the plan."""
    plan = json.loads(PLAN.read_text())
    if "tests" in plan:
        _reach(plan["tests"])
    for number, tests in plan.get("mutants", []):
        if not _try(number, tests):
            say(kind="reboot", after=number)
            break
    else:
        say(kind="done")


def say(**what: Any) -> None:
    """Report to the host."""
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


def _set(name: str, number: int) -> None:
    (KNOBS / name).write_text(str(number))


def _reach(tests: list[str]) -> None:
    """Run all tests with all mutants off, and report what each reaches."""
    cases = load()
    _set("mutant", 0)
    for number, test in enumerate(tests, 1):
        name, memory = _cases.split(test)
        _set("round", number)
        started = time.monotonic()
        outcome = _cases.run(cases[name], memory)
        took = time.monotonic() - started
        _set("round", 0)
        raw = (KNOBS / "reached").read_bytes()
        rounds = struct.unpack(f"={len(raw) // 4}I", raw)
        places = [place for place, last in enumerate(rounds) if last == number]
        say(kind="test", test=test, outcome=outcome, took=round(took, 4), places=places)


def _try(number: int, tests: list[str]) -> bool:
    """Switch a mutant on and run tests until one notices; return whether the guest can continue."""
    say(kind="trying", mutant=number)
    with contextlib.closing(Kmsg()) as log:
        verdict, last, text = _first_that_notices(number, tests)
        records = log.read()
    _set("mutant", 0)
    broken = [record.text for record in records if record.is_fatal]
    if broken and verdict == "survives":
        verdict, text = "kernel", broken[0]
    say(kind="verdict", mutant=number, verdict=verdict, test=last, text=text)
    # A mutant may leave something behind, for instance a leaked page.
    healthy = not broken and verdict != _cases.STUCK
    return healthy and _first_that_notices(0, CONTROL)[0] == "survives"


def _first_that_notices(number: int, tests: list[str]) -> tuple[str, str, str]:
    """Return caught, stalled, stuck or survives, the test that noticed, and its text.

    A test that fails runs again: the mutant counts as the cause only if it fails twice.
    """
    waiting = list(tests)
    while waiting:
        outcome = _first_bad(number, waiting)
        if outcome and (outcome[1] == _cases.STUCK or _first_bad(number, [outcome[0]])):
            test, text = outcome
            if text in (_cases.STALLED, _cases.STUCK):
                return text, test, f"nothing for {_cases.STALL_S:g} s"
            return "caught", test, text
    return "survives", "", ""


def _first_bad(number: int, waiting: list[str]) -> tuple[str, str] | None:
    """Run tests until one fails, and remove them from the list; return it and its text."""
    with contextlib.closing(_cases.outcomes(waiting, functools.partial(_switch, number))) as every:
        for test, outcome in every:
            waiting.remove(test)
            if outcome not in (_cases.PASSED, _cases.SKIPPED):
                return test, outcome
            if number:
                say(kind="passed", test=test)
    return None


def _switch(number: int, is_on: bool) -> None:
    _set("mutant", number if is_on else 0)


if __name__ == "__main__":
    main()
