"""Page sources in Python: process and thread driver against bare C, and many faults at once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks._pairs import Member, Row, Skipped, Target, latency_row, ratio_row, run_pairs
from benchmarks._setup import Setup, command

_ANY_CPU = -1
_PAGES = 8192
_QUICK_PAGES = 2048
_MODULE = "_python_members"
_THREADS = 64
#: 64 pages for each thread; a single worker gets fewer, since its round would last 4 s.
_SLOW_PAGES = 4096
_SLOW_PAGES_ALONE = 512
_PROTECTED_PAGES = 64
_FDS = 1000


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield latency and throughput of a trivial function, then many faults at once, then starts."""
    cpu, other = setup.faulter_cpu, setup.other_cpu
    yield from _process(setup, "spinning", _ANY_CPU, "process / spinning")
    name = "process on another CPU / spinning there"
    if other is None:
        yield Skipped(name, "this machine has one CPU")
    else:
        yield from _process(setup, "spinning", other, name)
    yield from _process(setup, "reading", cpu, "process on the faulter's CPU / read(2) loop there")
    yield _thread(setup)
    yield _workers(setup)
    yield _protected(setup)
    yield _adopted(setup)
    yield _start(setup)


def _process(setup: Setup, way: str, handler_cpu: int, name: str) -> Iterator[Row]:
    pages = _QUICK_PAGES if setup.quick else _PAGES
    cpu = setup.faulter_cpu
    pairs = run_pairs(
        command(setup.programs.fault, "missing", way, pages, 1, cpu, handler_cpu),
        setup.member("process", pages, cpu, handler_cpu, module=_MODULE),
        setup.rounds,
    )
    yield latency_row(f"missing fault, Python: {name}", pairs, target=Target("<=", 1.3))
    rates = [(a.per_second / 1e3, b.per_second / 1e3) for a, b in pairs]
    yield ratio_row(f"missing faults, Python: {name}", rates, unit="k/s", target=Target(">=", 0.7))


def _thread(setup: Setup) -> Row:
    pages = _QUICK_PAGES if setup.quick else _PAGES
    cpu = setup.faulter_cpu
    pairs = run_pairs(
        command(setup.programs.fault, "missing", "spinning", pages, 1, cpu, _ANY_CPU),
        setup.member("thread", pages, cpu, module=_MODULE),
        setup.rounds,
    )
    return latency_row(
        "missing fault of a child, Python: thread / spinning", pairs, target=Target("<=", 1.5)
    )


def _workers(setup: Setup) -> Row:
    pairs = run_pairs(
        setup.member("slow", _SLOW_PAGES_ALONE, _THREADS, 1, module=_MODULE),
        setup.member("slow", _SLOW_PAGES, _THREADS, _THREADS, module=_MODULE),
        setup.rounds,
    )
    rates = [(a.per_second / 1e3, b.per_second / 1e3) for a, b in pairs]
    return ratio_row(
        f"pages of 1 ms, {_THREADS} threads: {_THREADS} workers / 1 worker",
        rates,
        unit="k/s",
        target=Target(">=", 30),
    )


def _protected(setup: Setup) -> Row:
    words = ("protected", 4 * _SLOW_PAGES, _THREADS, _THREADS, _PROTECTED_PAGES)
    return _alone(setup, "write-protect fault beside them", "us", 1e3, Target("<=", 1000), *words)


def _adopted(setup: Setup) -> Row:
    cpu = setup.faulter_cpu
    pairs = run_pairs(
        setup.member("adopted", 4 * _FDS, 1, cpu, module=_MODULE),
        setup.member("adopted", 4 * _FDS, _FDS, cpu, module=_MODULE),
        setup.rounds,
    )
    name = f"missing fault: {_FDS} userfaultfds / 1, one native thread"
    return latency_row(name, pairs, target=Target("<=", 1.2))


def _start(setup: Setup) -> Row:
    name = "start of the process driver, to its first page"
    return _alone(setup, name, "ms", 1e6, Target("<=", 300), "start")


def _alone(setup: Setup, name: str, unit: str, scale: float, target: Target, *words: object) -> Row:
    """Return the row of a member that is compared with a bound, not with another member."""
    with Member(setup.member(*words, module=_MODULE)) as member:
        member.round()
        rounds = [member.round() for _ in range(setup.rounds)]
    return Row(
        name=name,
        unit=unit,
        ours=statistics.median(one.percentile(50) for one in rounds) / scale,
        target=target,
        detail={"p99": statistics.median(one.percentile(99) for one in rounds) / scale},
    )
