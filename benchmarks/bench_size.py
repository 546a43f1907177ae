"""What the library costs besides the faults: import, memory, regions, an idle handler."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks._pairs import Member, Row, Skipped, Target, latency_row, ratio_row, run_pairs
from benchmarks._setup import Setup

_PAGE = 4096
_REGIONS = 10_000
_SMALL, _LARGE = 1 << 30, 5 << 30
#: Interpreters started per module: an import needs milliseconds and varies by tens of per cent.
_IMPORTS = 15

_TIME_IMPORT = (
    "import time; t = time.perf_counter_ns(); import {}; print(time.perf_counter_ns() - t)"
)


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of import time, engine state, number of regions and idle CPU time."""
    yield _import_time(setup)
    yield _state_per_page(setup)
    for driver in ("native", "inline"):
        words = ("regions", driver, _REGIONS)
        pairs = run_pairs(
            setup.member(*words, 1, setup.faulter_cpu),
            setup.member(*words, _REGIONS, setup.faulter_cpu),
            setup.rounds,
        )
        name = f"missing fault: {driver}, {_REGIONS} regions / 1 region"
        yield latency_row(name, pairs, target=Target("<=", 1.1), target_p99=Target("<=", 1.3))
    yield _rare_faults(setup)


def _import_time(setup: Setup) -> Row:
    def measure(module: str) -> float:
        argv = [sys.executable, "-c", _TIME_IMPORT.format(module)]
        return int(subprocess.run(argv, check=True, capture_output=True).stdout) / 1e6

    modules = ("asyncio", "pyuffd")
    for module in modules:
        measure(module)
    times = []
    for i in range(max(setup.rounds, _IMPORTS)):
        order = modules if i % 2 == 0 else modules[::-1]
        measured = {module: measure(module) for module in order}
        times.append((measured["asyncio"], measured["pyuffd"]))
    return ratio_row("import pyuffd / import asyncio", times, unit="ms", target=Target("<=", 1.0))


def _state_per_page(setup: Setup) -> Row:
    """The slope between two sizes, so that what each handler costs once does not count."""
    grown = []
    for length in (_SMALL, _LARGE):
        with Member(setup.member("memory", length)) as member:
            grown.append(statistics.median(member.round().samples[0] for _ in range(3)))
    return Row(
        name="engine state per 4 KiB page",
        unit="bytes",
        ours=(grown[1] - grown[0]) / ((_LARGE - _SMALL) // _PAGE),
        target=Target("<=", 2),
        detail={"address_space_bytes": dict(zip((_SMALL, _LARGE), grown, strict=True))},
    )


def _rare_faults(setup: Setup) -> Row:
    with Member(setup.member("rare", 1 if setup.quick else 5)) as member:
        rounds = [member.round() for _ in range(2 if setup.quick else 3)]
    percent = [100 * r.samples[0] / r.wall_ns for r in rounds]
    return Row(
        name="native, 20 faults per second: CPU time",
        unit="% of a CPU",
        ours=statistics.median(percent),
        target=Target("<=", 2),
        detail={"percent_of_each_round": percent},
    )
