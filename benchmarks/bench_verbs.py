"""The verbs of Handler beside the same system calls in C, and a post-copy receiver."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._pairs import Row, Skipped, Target, latency_row, ratio_row, run_pairs
from benchmarks._setup import Setup, command

_GIB = 1 << 30
_MIB = 1 << 20
_REPEATS = 3


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of checkpoint, evict and fill, and of post-copy."""
    large, small = (_GIB, 64 * _MIB) if not setup.quick else (256 * _MIB, 16 * _MIB)
    for name, verb, length, piece, target in (
        (
            f"{large // _MIB} MiB: checkpoint, every tenth page dirty / the same in C",
            "checkpoint",
            large,
            0,
            Target("<=", 1.2),
        ),
        (
            "evict and reload, 4 KiB / the same system calls",
            "evict",
            small,
            4096,
            Target("<=", 1.3),
        ),
        (
            "evict and reload, 64 KiB / the same calls in C",
            "evict",
            small,
            64 << 10,
            Target("<=", 1.3),
        ),
        (
            f"{large // _MIB // 4} MiB: fill, 1 MiB at a time / UFFDIO_COPY",
            "fill",
            large // 4,
            _MIB,
            Target("<=", 1 / 0.95),
        ),
    ):
        pairs = run_pairs(
            command(setup.programs.verbs, verb, length, piece, _REPEATS),
            setup.member("verb", verb, length, piece, _REPEATS, module="_verb_members"),
            setup.rounds,
        )
        yield latency_row(name, pairs, target=target, unit="ms")
    length = (512 if not setup.quick else 64) * _MIB
    pairs = run_pairs(
        setup.member("post_copy", "raw", length, module="_verb_members"),
        setup.member("post_copy", "handler", length, module="_verb_members"),
        setup.rounds,
    )
    yield ratio_row(
        f"post-copy of {length // _MIB} MiB over TCP: Handler.fill / read_events and fill_copy",
        [(length / a.wall_ns * 1e9 / _MIB, length / b.wall_ns * 1e9 / _MIB) for a, b in pairs],
        unit="MiB/s",
        target=Target(">=", 0.9),
    )
