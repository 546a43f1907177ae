"""Break the library on purpose, one fix of a pitfall at a time, and check that tests notice.

Each mutant of mutants.toml is applied to a copy of the sources under build/engine-mutants. The
extension is built there, and the tests that the mutant names run with it. The unmodified copy
must pass all of them; with a mutant each of them must fail, every time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyuffd.testing import child_pids
from tests.engine_mutants._build import UNMODIFIED, Build, Run, RunError, id_of
from tests.engine_mutants._mutants import ROOT, Mutant, StaleMutantError, mutants, test_files

PAGE = ROOT / "docs/generated/engine-mutants.md"
PR_SET_CHILD_SUBREAPER = 36


def nodes(build: Build, every: Sequence[Mutant]) -> dict[str, str]:
    """Return the node of each test that a mutant names."""
    _, listed = build.pytest("--collect-only", *map(str, test_files()))
    found = {id_of(node): node for node in re.findall(r"^tests/\S+::\S+$", listed, re.MULTILINE)}
    wanted = {test for mutant in every for test in mutant.caught_by}
    if unknown := wanted - found.keys():
        raise RunError(f"there is no test {', '.join(sorted(unknown))}:\n{listed[-2000:]}")
    return {test: found[test] for test in sorted(wanted)}


def try_out(mutant: Mutant, tests: dict[str, str], times: int) -> list[Run]:
    """Build a mutant and run its tests."""
    build = Build(mutant)
    runs = [build.run({test: tests[test] for test in mutant.caught_by}) for _ in range(times)]
    shutil.rmtree(build.folder)
    return runs


def caught(runs: Sequence[Run], test: str) -> bool:
    """Whether a test noticed every time."""
    return all(run.ended[test] in ("failed", "hung") for run in runs)


def end_children() -> None:
    """Kill the remaining processes of the tests."""
    for pid in child_pids():
        os.kill(pid, signal.SIGKILL)


def lines(every: Sequence[Mutant], results: Sequence[Sequence[Run]], tests: int) -> Iterator[str]:
    """Write docs/generated/engine-mutants.md."""
    yield "# The library broken on purpose"
    yield ""
    yield (
        "Which test protects which fix? The pitfalls are those that users of userfaultfd are known "
        "to have met; each row takes one precaution away and names the tests that fail then. [How "
        "pyuffd works](../design.md) describes the precautions."
    )
    yield ""
    yield (
        "Written by `make engine-mutants`; do not edit. Each row is this library with one small "
        "change (`tests/engine_mutants/mutants.toml`) that removes one fix of a pitfall. The tests "
        f"named beside it fail with that change every time (runs of each: {len(results[0])}); "
        f"without a change all {tests} of them pass. *hangs*: the test ran into its time limit. "
        "If one test catches several mutants, each removes a different part of what it checks."
    )
    yield ""
    yield "| pitfall | mutant | what it removes | file | caught by |"
    yield "|---|---|---|---|---|"
    for mutant, runs in zip(every, results, strict=True):
        names = []
        for test in mutant.caught_by:
            how = "" if caught(runs, test) else " **not caught**"
            hangs = any(run.ended[test] == "hung" for run in runs)
            names.append(f"`{test}`{how}{' (hangs)' if hangs else ''}")
        yield (
            f"| {mutant.pitfall} | `{mutant.name}` | {mutant.takes} | `{Path(mutant.file).name}` "
            f"| {', '.join(names)} |"
        )


def main() -> int:
    """Run all, write the page; return 0 if tests catch every mutant and pass without one."""
    parser = argparse.ArgumentParser(prog="tests.engine_mutants", description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="runs of each mutant (default: 3)")
    parser.add_argument("--parallel", type=int, default=1, help="mutants at a time")
    parser.add_argument("names", nargs="*", help="only these; the page stays as it is")
    options = parser.parse_args()
    every = [m for m in mutants() if not options.names or m.name in options.names]
    if unknown := set(options.names) - {mutant.name for mutant in every}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wrong, results = [], []
    # Processes that a killed test leaves behind become children of this one, which kills them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        build = Build(None)
        tests = nodes(build, every)
        run = build.run(tests)
        print(f"{UNMODIFIED}: {len(tests)} tests, {run.wall_s:.0f} s", flush=True)
        bad = [f"{test} {how}" for test, how in run.ended.items() if how != "passed"]
        if bad:
            raise RunError(f"the unmodified library does not pass: {', '.join(bad)}")
        pool = ThreadPoolExecutor(options.parallel)
        tried = pool.map(lambda m: try_out(m, tests, options.times), every)
        for mutant, runs in zip(every, tried, strict=True):
            results.append(runs)
            missed = [test for test in mutant.caught_by if not caught(runs, test)]
            wrong += [f"{mutant.name} is not caught by {test}" for test in missed]
            seconds = " ".join(f"{one.wall_s:.0f}" for one in runs)
            print(f"{'MISSED' if missed else 'caught'} {mutant.name} ({seconds} s)", flush=True)
    except (RunError, StaleMutantError, KeyboardInterrupt) as error:
        print(f"engine-mutants: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
        end_children()
        os._exit(2)  # the pool's threads would continue with the rest
    end_children()
    if not options.names:
        PAGE.write_text("\n".join(lines(every, results, len(tests))) + "\n")
    for sentence in wrong:
        print(f"engine-mutants: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
