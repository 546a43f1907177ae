"""Kernels broken by machine: which tests of the conformance suite notice each of the mutants.

One kernel contains all mutants (`_mutate`), of which one at a time is on (`_mutate_guest`). First
every test runs on the unmodified kernel, which shows what the test reaches. Then the tests that
reach a mutant run with it, the most promising first, until one fails. If a mutant ends a guest or
leaves it in a bad state, the guest is booted again and continues with the next mutant.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import re
import sys
import threading
import time
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyuffd.conformance import load
from tests.vm import _cases, _debian, _image, _mutate, _mutate_guest, _run, _tree
from tests.vm._coverage import NEED_A_GUEST
from tests.vm._mutants import Builder, BuildError
from tests.vm._mutate import Mutant

OUTPUT = _image.ROOT / "build/machine-mutants"
PAGE = _image.ROOT / "docs/generated/machine-mutants.md"
REASONS = Path(__file__).with_name("equivalent.toml")
MISSING = "**a case is missing**"
UNSURE = "it has not met every test"
# Limits for a small kernel under emulation. A mutant may make a test wait in vain until its limit.
SCALE = 2.0
BOOT_SCALE = 40.0
RUN_S = 36000.0
# A test takes less time, or prints that it takes more; a kernel that hangs prints nothing.
QUIET_S = 40.0
# The number of tests that run first with a mutant. Only if it survives them, all others that reach
# it run too.
FIRST = 40
ONE_OF = 4
TYPES = 5
SEED = 6
# How many mutants a guest gets at a time.
SHARE = 20
# How many tests that were written for a function run first with its mutants.
MEANT = 20
# A test that runs longer than this runs only with mutants that fewer than FIRST others reach.
LONG_S = 10.0

_WORDS = re.compile(r"uffd|userfaultfd|pte_marker")
_OTHERS = (
    *("memory", "hugetlb", "mprotect", "mremap", "shmem", "huge_memory", "khugepaged", "swapfile"),
    *("rmap", "migrate", "gup", "madvise"),
)
_LEFT_OUT = ("userfaultfd_init", "init_once_userfaultfd_ctx")


def _is_wanted(file: str, function: str, text: str) -> bool:
    if function in _LEFT_OUT:
        return False
    if file in ("fs/userfaultfd.c", "mm/userfaultfd.c"):
        return True
    if file == "fs/proc/task_mmu.c":
        return "pagemap_scan" in function or "uffd_wp" in function
    return _WORDS.search(text) is not None


FILES = (
    *("mm/userfaultfd.c", "fs/userfaultfd.c", "fs/proc/task_mmu.c"),
    *(f"mm/{name}.c" for name in _OTHERS),
)


def mutate_tree(pristine: Path, tree: Path) -> list[Mutant]:
    """Write every mutant into the files of a tree; return them in order of their numbers."""
    every: list[Mutant] = []
    texts: dict[str, str] = {}
    # An older or newer kernel may lack one of the files.
    for file in (file for file in FILES if (pristine / file).exists()):
        text = (pristine / file).read_text()
        wanted = functools.partial(_is_wanted, file)
        texts[file], mutants = _mutate.mutate(file, text, wanted, len(every) + 1)
        every += mutants
    size = f"#define PYUFFD_MUTANTS {len(every) + 1}\n"
    texts["mm/userfaultfd.c"] += size + _mutate.DEFINITIONS
    texts["include/linux/pyuffd_mutant.h"] = _mutate.HEADER
    for file, text in texts.items():
        # Do not touch unchanged files: make would compile them again.
        if not (tree / file).exists() or (tree / file).read_text() != text:
            (tree / file).write_text(text)
    return every


def build(jobs: int) -> tuple[Path, list[Mutant]]:
    """Return the kernel with all mutants, and what they are."""
    pristine = _tree.pristine()
    tree = _tree.copy(pristine, "mutated")
    every = mutate_tree(pristine, tree)
    builder = Builder(tree, jobs)
    builder.configure()
    print(f"machine-mutants: building a kernel with {len(every)} mutants", flush=True)
    builder.make("bzImage")
    return tree / "arch/x86/boot/bzImage", every


def choose(one_of: int, types: int) -> list[str]:
    """Return the ids of the tests to run with mutants.

    Args:
        one_of: Choose one in this many crossings.
        types: Choose at most this many memory types of each case.
    """
    found: list[str] = []
    for case in load().values():
        # Every test has the guest for itself, so cases that must run alone can be chosen too.
        is_slow = case.is_slow and case.name not in NEED_A_GUEST
        if is_slow or any(word in case.name for word in _mutate_guest.LONG):
            continue
        # Choose different types for each case, and the same again if cases are added.
        first = zlib.crc32(case.name.encode()) % len(case.ids)
        ids = (case.ids[first:] + case.ids[:first])[:types]
        found += [
            name
            for number, name in enumerate(ids)
            if not case.is_crossing or (first + number) % one_of == 0
        ]
    return found


def said(
    kernel: Path,
    name: str,
    plan: dict[str, Any],
    stop: threading.Event,
    until: float = math.inf,
) -> tuple[list[dict[str, Any]], str]:
    """Boot with a plan; return what the guest reported, and how it ended.

    Args:
        kernel: The kernel to boot.
        name: The name of the run's folder.
        plan: What the guest is to do.
        stop: Ends the guest early.
        until: When it must end, by `time.monotonic`.
    """
    guest = _run.Guest(
        kernel,
        OUTPUT / name,
        accel=_run.accel(1),
        scale=SCALE,
        boot_s=_run.BOOT_S * BOOT_SCALE,
        run_s=RUN_S,
        counted=True,
        quiet_s=QUIET_S,
        until=until,
        stop=stop,
        files={str(_mutate_guest.PLAN): json.dumps(plan).encode()},
        show=_progress(),
    )
    result = guest.run([sys.executable, "-m", "tests.vm._mutate_guest"])
    lines = []
    for line in (result.folder / "console.log").read_text(errors="replace").splitlines():
        _, mark, text = line.partition(_mutate_guest.MARK)
        if mark:
            try:
                lines.append(json.loads(text))
            except ValueError:  # a kernel message is in between
                continue
    return lines, result.sentence


def _progress() -> Any:
    started = time.monotonic()
    counts = Counter[str]()

    def show(data: bytes) -> None:
        before = sum(counts.values())
        counts.update(re.findall(r'"kind": "(test|verdict)"', data.decode(errors="replace")))
        after = sum(counts.values())
        if after // 50 != before // 50:
            took = time.monotonic() - started
            print(f"machine-mutants: {after} done in {took:.0f} s", flush=True)

    return show


def at_a_time(parallel: int, work: Callable[[int, threading.Event], None]) -> None:
    """Do the work of several guests at a time; an exception in one ends the others.

    Args:
        parallel: How many guests.
        work: Called with the number of the guest, and an event that ends it early.
    """
    stop = threading.Event()

    def one(number: int) -> None:
        try:
            work(number, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for _ in pool.map(one, range(parallel)):
                pass
        except BaseException:
            stop.set()
            raise


def reach(kernel: Path, tests: Sequence[str], parallel: int) -> dict[str, dict[str, Any]]:
    """Run the tests that no earlier run has run, with all mutants off.

    Returns:
        By id, the outcome, the time and the places of every test so far.

    Raises:
        BuildError: the kernel does not get through all tests.
    """
    file = OUTPUT / "reach.json"
    found: dict[str, dict[str, Any]] = {}
    if file.exists() and file.stat().st_mtime > kernel.stat().st_mtime:
        found = json.loads(file.read_text())
    new = [test for test in tests if test not in found]
    lock = threading.Lock()

    def work(number: int, stop: threading.Event) -> None:
        part = new[number::parallel]
        if not part:
            return
        lines, sentence = said(kernel, f"reach-{number}", {"tests": part}, stop)
        with lock:
            found.update({line["test"]: line for line in lines if line["kind"] == "test"})
            # Also if the run was interrupted: the next one continues it.
            file.write_text(json.dumps(found))
        if not any(line["kind"] == "done" for line in lines):
            raise BuildError(f"the kernel with all mutants off does not run the suite: {sentence}")

    at_a_time(parallel, work)
    return found


class Planner:
    """Plans which tests run with a mutant, those first that know its function best.

    Args:
        mutants: All of them.
        reached: What each test reaches.
    """

    def __init__(self, mutants: Sequence[Mutant], reached: Mapping[str, Mapping[str, Any]]) -> None:
        cases = load()
        self._able = [line for line in reached.values() if not line["outcome"]]
        self._able.sort(key=lambda line: line["took"])
        self._places = {line["test"]: frozenset(line["places"]) for line in self._able}
        self._origins = {
            test: cases[name].origin if (name := _cases.split(test)[0]) in cases else ""
            for test in self._places
        }
        self._near: dict[tuple[str, str], set[int]] = {}
        for mutant in mutants:
            self._near.setdefault((mutant.file, mutant.function), set()).add(mutant.number)

    def plan(self, mutant: Mutant, most: int | None) -> list[str]:
        """Return the tests that reach a mutant.

        First come the tests that were written for its function; then a few that together reach all
        other reachable places in it; then those whose names share most words with it; then the
        quickest, one of each kind before a second one.
        """
        able = [line for line in self._able if mutant.number in self._places[line["test"]]]
        quick = [line for line in able if line["took"] < LONG_S]
        able = quick if len(quick) >= FIRST else able
        tests = [line["test"] for line in able]
        word = re.compile(rf"\b{re.escape(mutant.function)}\b")
        meant = [test for test in tests if word.search(self._origins[test])]
        first = _alternate(meant)[:MEANT]
        first += self._all_ways(tests, self._near[mutant.file, mutant.function])
        words = _words(f"{mutant.function} {mutant.was}")
        shared = {test: len(words & _words(test)) for test in tests}
        for count in sorted(set(shared.values()) - {0}, reverse=True):
            first += _alternate([test for test in tests if shared[test] == count])
        return list(dict.fromkeys([*first, *_alternate(tests)]))[:most]

    def _all_ways(self, tests: Sequence[str], near: set[int]) -> list[str]:
        """Return tests that together reach every reachable place of the function."""
        ways = {test: self._places[test] & near for test in tests}
        left = set().union(*ways.values())
        found = []
        while left:
            best = max(tests, key=lambda test: len(ways[test] & left))
            found.append(best)
            left -= ways[best]
        return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{2,}", text.lower()))


def _alternate(tests: Sequence[str]) -> list[str]:
    """Put one of each kind of test before the second of any."""
    seen = Counter[str]()
    ranked = []
    for number, test in enumerate(tests):
        kind = test.rpartition(".")[0].rpartition(".")[0]
        ranked.append((seen[kind], number, test))
        seen[kind] += 1
    return [test for _, _, test in sorted(ranked)]


def judge(
    kernel: Path,
    mutants: Sequence[Mutant],
    planner: Planner,
    until: float,
    parallel: int,
    most: int | None = None,
) -> dict[int, dict[str, Any]]:
    """Return a verdict for each mutant, or for as many as there is time for.

    Raises:
        BuildError: a guest did not reach its first mutant.
    """
    file = OUTPUT / "verdicts.json"
    verdicts: dict[int, dict[str, Any]] = {}
    if file.exists() and file.stat().st_mtime > kernel.stat().st_mtime:
        verdicts = {int(key): value for key, value in json.loads(file.read_text()).items()}
    for some in (FIRST, most):
        plans = {mutant.number: planner.plan(mutant, some) for mutant in mutants}
        waiting = [
            mutant
            for mutant in mutants
            if _is_open(verdicts.get(mutant.number), len(plans[mutant.number]))
        ]
        lock = threading.Lock()

        def work(
            number: int,
            stop: threading.Event,
            waiting: list[Mutant] = waiting,
            plans: dict[int, list[str]] = plans,
            lock: threading.Lock = lock,
        ) -> None:
            while time.monotonic() < until and not stop.is_set():
                with lock:
                    part = [waiting.pop(0).number for _ in waiting[:SHARE]]
                if not part:
                    return
                plan = {"mutants": [(mutant, plans[mutant]) for mutant in part]}
                lines, sentence = said(kernel, f"judge-{number}", plan, stop, until)
                is_over = time.monotonic() > until or stop.is_set()
                if not lines and not is_over:
                    raise BuildError(f"no mutant was tried: {sentence}")
                with lock:
                    # A mutant that was interrupted at the end of the time has no verdict.
                    _take(verdicts, lines, None if is_over else sentence, plans)
                    file.write_text(json.dumps(verdicts))
                    left = [m for m in part if _is_open(verdicts.get(m), len(plans[m]))]
                    waiting[:0] = [mutant for mutant in mutants if mutant.number in left]
                    print(
                        f"machine-mutants: {len(verdicts)} judged, {_summary(verdicts)}", flush=True
                    )

        at_a_time(parallel, work)
    return verdicts


def _is_open(verdict: dict[str, Any] | None, tests: int) -> bool:
    """Return whether this many tests may show something new about a mutant."""
    met = 0 if verdict is None else verdict["met"]
    return tests > met and (verdict is None or verdict["verdict"] == "survives")


def _take(
    verdicts: dict[int, dict[str, Any]],
    lines: list[dict[str, Any]],
    sentence: str | None,
    plans: Mapping[int, Sequence[str]],
) -> None:
    """Add what a guest has reported.

    Args:
        verdicts: The verdicts to add to.
        lines: What the guest reported.
        sentence: How it ended; None if we ended it early, which says nothing about the mutant.
        plans: The tests that were to run with each mutant.
    """
    trying, passed = None, 0
    for line in lines:
        if line["kind"] == "trying":
            trying, passed = line["mutant"], 0
        elif line["kind"] == "passed":
            passed += 1
        elif line["kind"] == "verdict":
            verdicts[line["mutant"]] = {**line, "met": len(plans[line["mutant"]])}
            trying = None
    if trying is not None and sentence is not None:
        plan = plans[trying]
        test = plan[min(passed, len(plan) - 1)] if plan else ""
        text = sentence or "the guest ended"
        verdicts[trying] = {"verdict": "died", "test": test, "text": text, "met": len(plan)}


def _summary(verdicts: dict[int, dict[str, Any]]) -> str:
    counts = Counter(verdict["verdict"] for verdict in verdicts.values())
    return ", ".join(f"{count} {word}" for word, count in counts.most_common())


def reasons() -> dict[tuple[str, str, str, str], str]:
    """Return why nothing can notice a mutant, by file, function, kind and original text."""
    rows = tomllib.loads(REASONS.read_text())["mutant"]
    return {(row["file"], row["function"], row["kind"], row["was"]): row["why"] for row in rows}


def key_of(mutant: Mutant) -> tuple[str, str, str, str]:
    """Return the key of a mutant in the list of reasons, which does not depend on its line."""
    return mutant.file, mutant.function, mutant.kind, mutant.was


# The page

NOTICED = ("caught", "stalled", "stuck", "kernel", "died")


def page(
    mutants: Sequence[Mutant],
    reached: dict[str, dict[str, Any]],
    verdicts: dict[int, dict[str, Any]],
    release: str,
) -> str:
    """Return docs/generated/machine-mutants.md."""
    return "\n".join(_lines(mutants, reached, verdicts, release)) + "\n"


def _lines(
    mutants: Sequence[Mutant],
    reached: dict[str, dict[str, Any]],
    verdicts: dict[int, dict[str, Any]],
    release: str,
) -> Iterator[str]:
    places = {number for line in reached.values() for number in line["places"]}
    judged = [mutant for mutant in mutants if mutant.number in verdicts]
    noticed = [m for m in judged if verdicts[m.number]["verdict"] in NOTICED]
    survivors = [m for m in judged if m not in noticed]
    yield "# Kernels broken by machine"
    yield ""
    yield (
        "Which changes of the kernel would the suite miss? A program changes its source in every"
        " place where a condition, a bound or a call could be wrong; the last table lists what no"
        " test noticed, and why."
    )
    yield ""
    yield (
        f"Written by `make machine-mutants`; do not edit. Linux {release} in one kernel with"
        f" {len(mutants)} mutants of its functions, of which one at a time is on. {len(reached)}"
        f" tests of the conformance suite reach {len(places)} of the mutants. Mutants were tried in"
        f" random order (seed {SEED}), until the time was over: **{len(judged)}"
        f" tried, {len(noticed)} noticed, {len(survivors)} survived**. A survivor has met every"
        " test that reaches it if the last column says so. [Tests on another kernel]"
        "(../kernels.md#kernels-broken-by-machine) tells how to continue."
    )
    yield ""
    yield "| file | mutants | reached by a test | tried | noticed | survived |"
    yield "|---|---|---|---|---|---|"
    for file in FILES:
        own = [mutant for mutant in mutants if mutant.file == file]
        yield (
            f"| {file} | {len(own)} | {sum(m.number in places for m in own)} |"
            f" {sum(m.file == file for m in judged)} | {sum(m.file == file for m in noticed)} |"
            f" {sum(m.file == file for m in survivors)} |"
        )
    yield ""
    yield "How they were noticed:"
    yield ""
    words = {
        "caught": "a test failed",
        "stalled": "a test never ended",
        "stuck": "a test could not be killed",
        "kernel": "the kernel said that it is broken",
        "died": "the guest ended",
    }
    counts = Counter(verdicts[m.number]["verdict"] for m in noticed)
    yield from (f"- {text}: {counts[word]}" for word, text in words.items() if counts[word])
    yield ""
    yield "## Survivors"
    yield ""
    yield "| mutant | function | was | became | why nothing notices | met all tests that reach it |"
    yield "|---|---|---|---|---|---|"
    known = reasons()
    planner = Planner(mutants, reached)
    for mutant in survivors:
        has_met = verdicts[mutant.number]["met"] >= len(planner.plan(mutant, None))
        everything = "yes" if has_met else "no"
        why = known.get(key_of(mutant), MISSING if has_met else UNSURE)
        yield (
            f"| {mutant.name} | `{mutant.function}` | `{_code(mutant.was)}` |"
            f" `{_code(mutant.becomes)}` | {why} | {everything} |"
        )
    yield ""
    yield "## Functions whose mutants no test reaches"
    yield ""
    missed: dict[tuple[str, str], int] = {}
    for mutant in mutants:
        if mutant.number not in places:
            key = mutant.file, mutant.function
            missed[key] = missed.get(key, 0) + 1
    yield "| file | function | mutants not reached |"
    yield "|---|---|---|"
    for (file, function), count in missed.items():
        yield f"| {file} | `{function}` | {count} |"
    yield ""
    yield "## What noticed each"
    yield ""
    yield "| mutant | function | was | became | noticed by | what it said |"
    yield "|---|---|---|---|---|---|"
    for mutant in noticed:
        verdict = verdicts[mutant.number]
        text = re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", verdict["text"])[:120]
        yield (
            f"| {mutant.name} | `{mutant.function}` | `{_code(mutant.was)}` |"
            f" `{_code(mutant.becomes)}` | `{verdict['test'] or '-'}` ({verdict['verdict']}) |"
            f" {_code(text)} |"
        )


def _code(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'") or "(nothing)"


def main() -> int:
    """Build, find out what tests reach, judge the mutants, write the page."""
    parser = argparse.ArgumentParser(prog="machine-mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="make -j")
    parser.add_argument("--parallel", type=int, default=1, help="guests at a time")
    parser.add_argument("--minutes", type=float, default=600, help="for judging mutants")
    parser.add_argument("--count", type=int, help="judge at most this many mutants")
    parser.add_argument("--tests", type=int, help="run at most this many tests with a mutant")
    parser.add_argument("--function", action="append", help="only mutants of this function")
    parser.add_argument("--crossings", type=int, default=ONE_OF, help="run one in this many")
    parser.add_argument("--types", type=int, default=TYPES, help="memory types for each case")
    parser.add_argument(
        "--known", action="store_true", help="only tests whose reach is known from earlier runs"
    )
    parser.add_argument("--again", action="store_true", help="write the page again, run nothing")
    options = parser.parse_args()
    _run.end_with_us()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        kernel, every = build(options.jobs)
        wanted = [] if options.known else choose(options.crossings, options.types)
        reached = reach(kernel, wanted, options.parallel)
        print(f"machine-mutants: {len(reached)} tests have run", flush=True)
        chosen = [m for m in every if not options.function or m.function in options.function]
        random.Random(SEED).shuffle(chosen)
        until = time.monotonic() + (0 if options.again else options.minutes * 60)
        planner = Planner(every, reached)
        chosen = chosen[: options.count]
        verdicts = judge(kernel, chosen, planner, until, options.parallel, options.tests)
    except (BuildError, _debian.KernelNotFoundError, _image.MissingOnHostError) as error:
        print(f"machine-mutants: {error}", file=sys.stderr)
        return 2
    release = Builder(_tree.pristine(), 1).release
    PAGE.write_text(page(every, reached, verdicts, release))
    print(f"machine-mutants: {_summary(verdicts)}; {PAGE}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
