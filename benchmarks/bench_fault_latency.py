"""Latency of one 4 KiB fault: each driver against the bare C program of its kind."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._pairs import Row, Skipped, Target, latency_row, run_pairs
from benchmarks._setup import Setup, command

_ANY_CPU = -1
_P99 = Target("<=", 1.3)
_PAGES = 8192
_QUICK_PAGES = 1024
# Each waits for one page, at the same time.
_CROWD = 4000
_QUICK_CROWD = 500


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield a row for each kind of fault and each pair of programs.

    The faulting thread has a CPU of its own in every pair. By default the scheduler places
    the native thread, and that of the C program. Whether the two threads share a CPU matters more
    than the program, so the same pair also runs with both handlers on the other CPU.
    """
    cpu, other = setup.faulter_cpu, setup.other_cpu
    for kind in ("missing", "wp", "minor"):
        yield _pair(setup, kind, "native", "spinning", _ANY_CPU, Target("<=", 1.10))
        name = f"{kind} fault: native on another CPU / spinning there"
        if other is None:
            yield Skipped(name, "this machine has one CPU")
        else:
            yield _pair(setup, kind, "native", "spinning", other, Target("<=", 1.10), name)
        name = f"{kind} fault: native on the faulter's CPU / read(2) loop there"
        yield _pair(setup, kind, "native", "reading", cpu, Target("<=", 1.15), name)
        yield _pair(setup, kind, "inline", "sigbus", _ANY_CPU, Target("<=", 1.15))
        yield _pair(setup, kind, "native", "blocking", _ANY_CPU, None)
    yield _crowd(setup)


def _pair(
    setup: Setup,
    kind: str,
    driver: str,
    way: str,
    handler_cpu: int,
    target: Target | None,
    name: str = "",
) -> Row:
    pages = _QUICK_PAGES if setup.quick else _PAGES
    where = (pages, 1, setup.faulter_cpu, handler_cpu)
    pairs = run_pairs(
        command(setup.programs.fault, kind, way, *where),
        setup.member("fault", kind, driver, *where),
        setup.rounds,
    )
    return latency_row(
        name or f"{kind} fault: {driver} / {way}",
        pairs,
        target=target,
        target_p99=_P99 if target else None,
    )


def _crowd(setup: Setup) -> Row:
    """Compare with a program that answers one fault after the other, as most do."""
    threads = _QUICK_CROWD if setup.quick else _CROWD
    where = (threads, threads, _ANY_CPU, _ANY_CPU)
    pairs = run_pairs(
        command(setup.programs.fault, "missing", "blocking", *where),
        setup.member("fault", "missing", "native", *where),
        setup.rounds,
    )
    return latency_row(
        f"missing faults of {threads:,} threads at once: native / blocking",
        pairs,
        target=None if setup.quick else Target("<=", 0.5),
        unit="ms",
    )
