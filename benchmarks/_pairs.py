"""Paired runs: two processes that take turns, and the statistics of their ratio."""

from __future__ import annotations

import statistics
import struct
import subprocess
import threading
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Literal, Self

#: A round lasts well under a second; a member that needs this long is stuck.
_ROUND_LIMIT_S = 60.0

_HEADER = struct.Struct("=QQ")


class MemberError(RuntimeError):
    """A member of a pair ended, or was stuck and has been killed."""


@dataclass(frozen=True)
class Round:
    """One answer of a member: the wall time of the round and its samples."""

    wall_ns: int
    samples: array[int]

    def percentile(self, percent: float) -> int:
        """Return the sample that `percent` of all samples do not exceed (nearest rank)."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    @property
    def per_second(self) -> float:
        """Samples per second of wall time."""
        return len(self.samples) / self.wall_ns * 1e9


class Member:
    """A process that does one round for each line it is sent."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; kill it if it does not exit."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def round(self) -> Round:
        """Run one round and return what was measured.

        Raises:
            MemberError: the process ended, or needed longer than a round may last.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(_ROUND_LIMIT_S, process.kill)
        watchdog.start()
        try:
            process.stdin.write(b"\n")
            process.stdin.flush()
            header = process.stdout.read(_HEADER.size)
            if len(header) == _HEADER.size:
                wall_ns, count = _HEADER.unpack(header)
                body = process.stdout.read(8 * count)
                if len(body) == 8 * count:
                    return Round(wall_ns, array("Q", body))
        except BrokenPipeError:
            pass
        finally:
            watchdog.cancel()
        process.kill()
        raise MemberError(f"{' '.join(self._argv)}: exit status {process.wait()}")


def run_pairs(base: Sequence[str], ours: Sequence[str], rounds: int) -> list[tuple[Round, Round]]:
    """Run both members `rounds` times in turn; they take turns at being first.

    Each does one round first that is not counted.
    """
    pairs: list[tuple[Round, Round]] = []
    with ExitStack() as stack:
        a, b = stack.enter_context(Member(base)), stack.enter_context(Member(ours))
        a.round()
        b.round()
        for i in range(rounds):
            if i % 2 == 0:
                first = a.round()
                pairs.append((first, b.round()))
            else:
                second = b.round()
                pairs.append((a.round(), second))
    return pairs


@dataclass(frozen=True)
class Target:
    """The bound that a number must keep: at most (``<=``) or at least (``>=``) `value`."""

    relation: Literal["<=", ">="]
    value: float

    def __str__(self) -> str:
        return f"{self.relation} {self.value:g}"

    def met(self, measured: float) -> bool:
        """Return whether `measured` keeps the bound."""
        return measured <= self.value if self.relation == "<=" else measured >= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        unit: of `base` and `ours`.
        base: median of the C program (or other base case); None if the number stands alone.
        ours: median of pyuffd.
        ratio: median over the pairs of ours / base; None if there is no base.
        target: bound of `ratio`, or of `ours` if there is no base; None: for information.
        ratio_p99: like `ratio`, of the 99th percentile.
        target_p99: bound of `ratio_p99`.
        detail: further numbers, for the JSON file.
    """

    name: str
    unit: str
    ours: float
    base: float | None = None
    ratio: float | None = None
    target: Target | None = None
    ratio_p99: float | None = None
    target_p99: Target | None = None
    detail: dict[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``ok``, or which bound was not kept; empty without a target."""
        if self.target is None:
            return ""
        measured = self.ours if self.ratio is None else self.ratio
        missed = [] if self.target.met(measured) else ["over" if self.ratio_p99 is None else "p50"]
        if self.target_p99 and self.ratio_p99 is not None:
            missed += [] if self.target_p99.met(self.ratio_p99) else ["p99"]
        if not missed:
            return "ok"
        return "over" if missed == ["over"] else "over: " + ", ".join(missed)


@dataclass(frozen=True)
class Skipped:
    """A line that could not be measured, and why."""

    name: str
    reason: str


def latency_row(
    name: str,
    pairs: Sequence[tuple[Round, Round]],
    *,
    target: Target | None,
    target_p99: Target | None = None,
    unit: Literal["us", "ms"] = "us",
) -> Row:
    """Make the row of a latency: the ratios of p50 and of p99, each the median over the pairs."""
    scale = {"us": 1e3, "ms": 1e6}[unit]

    def ratio(percent: float) -> float:
        return statistics.median(b.percentile(percent) / a.percentile(percent) for a, b in pairs)

    def median(which: int, percent: float) -> float:
        return statistics.median(pair[which].percentile(percent) for pair in pairs) / scale

    percentiles = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
    return Row(
        name=name,
        unit=unit,
        base=median(0, 50),
        ours=median(1, 50),
        ratio=ratio(50),
        target=target,
        ratio_p99=ratio(99),
        target_p99=target_p99,
        detail={
            "pairs": len(pairs),
            "samples_per_round": len(pairs[0][0].samples),
            "base": {key: median(0, percent) for key, percent in percentiles.items()},
            "ours": {key: median(1, percent) for key, percent in percentiles.items()},
            "ratio": {key: ratio(percent) for key, percent in percentiles.items()},
            "ratio_p50_of_each_pair": [b.percentile(50) / a.percentile(50) for a, b in pairs],
            "base_per_second": statistics.median(a.per_second for a, _ in pairs),
            "ours_per_second": statistics.median(b.per_second for _, b in pairs),
        },
    )


def ratio_row(
    name: str, pairs: Sequence[tuple[float, float]], *, unit: str, target: Target | None
) -> Row:
    """Make the row of a single number from (base, ours) of each pair."""
    ratios = [ours / base for base, ours in pairs]
    return Row(
        name=name,
        unit=unit,
        base=statistics.median(base for base, _ in pairs),
        ours=statistics.median(ours for _, ours in pairs),
        ratio=statistics.median(ratios),
        target=target,
        detail={"pairs": len(pairs), "ratio_of_each_pair": ratios},
    )
