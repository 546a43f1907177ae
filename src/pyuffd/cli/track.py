"""`pyuffd track`: show what a running process writes, by mapping, live (layer L6)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

from pyuffd import DirtyTracker, Process, ProcessGoneError
from pyuffd.cli._counted import counted
from pyuffd.cli._heat import Heat
from pyuffd.cli._signals import ended_by
from pyuffd.cli._words import pid, seconds
from pyuffd.cli._written import Sample, Written

EXIT_MISSING = 2
EXIT_INTERRUPTED = 130

MIB = float(1 << 20)
SHORTEST_S = 0.01
WINDOWS_S = (1, 10, 60)
BLIND_SHOWN = 5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `track` command."""
    parser = subparsers.add_parser(
        "track",
        description="Show what a running process writes: MiB/s and the dirty set of the last 1, 10"
        " and 60 seconds, by mapping. The memory whose writes cannot be seen is listed first. The"
        " process needs no preparation, and continues to run when the command ends.",
        epilog="Exit status: 0 at the end of --seconds or of the process, 2 on an error, 130 after"
        " Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if the reader of stdout is"
        " gone. A live table needs rich (pip install 'pyuffd[cli]'), --png needs matplotlib"
        " (pip install 'pyuffd[plot]').",
    )
    duration = seconds(SHORTEST_S, 1e9)
    parser.add_argument("pid", type=pid, metavar="PID", help="the process, or one of its threads")
    parser.add_argument(
        "--interval",
        type=duration,
        default=1.0,
        metavar="S",
        help="seconds per round (1)",
    )
    parser.add_argument("--seconds", type=duration, metavar="S", help="end after this time")
    parser.add_argument("--top", type=_count, default=15, metavar="N", help="mappings shown (15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per round")
    parser.add_argument(
        "--png", metavar="FILE", help="draw a heat map, address by time, at the end"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be above zero")
    return value


def run(args: argparse.Namespace) -> int:
    """Track the process until it ends, the time is over or a signal arrives."""
    if args.png and importlib.util.find_spec("matplotlib") is None:
        print("pyuffd: --png needs matplotlib: pip install 'pyuffd[plot]'", file=sys.stderr)
        return EXIT_MISSING
    if args.png:
        with open(args.png, "ab"):  # fail now, not after an hour
            pass
    heat = Heat() if args.png else None
    try:
        with (
            ended_by(signal.SIGTERM, signal.SIGHUP),
            Process(args.pid) as target,
        ):
            if target.pid == os.getpid():
                print("pyuffd: a process cannot track itself with this command", file=sys.stderr)
                return EXIT_MISSING
            with DirtyTracker(target) as tracker:
                return _follow(args, target, tracker, heat)
    finally:
        if heat is not None:
            heat.draw(args.png)


def _follow(
    args: argparse.Namespace, target: Process, tracker: DirtyTracker, heat: Heat | None
) -> int:
    written = Written(target, WINDOWS_S)
    begin = time.monotonic()
    try:
        with _screen(args, target, tracker) as screen:
            for number in _rounds(args, begin):
                with tracker.collect() as round_:
                    sample = written.add(round_, time.monotonic() - begin)
                    round_.commit()
                if heat is not None:
                    heat.add(sample)
                screen.show(sample, number)
    except ProcessGoneError:
        print(f"pyuffd: process {target.pid} has ended", file=sys.stderr)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _rounds(args: argparse.Namespace, begin: float) -> Iterator[int]:
    """Yield a number at the end of each interval."""
    number = 0
    while args.seconds is None or number * args.interval < args.seconds:
        number += 1
        time.sleep(max(0.0, begin + number * args.interval - time.monotonic()))
        yield number


# What is printed


class _Screen(Protocol):
    def show(self, sample: Sample, number: int) -> None: ...


def _screen(
    args: argparse.Namespace, target: Process, tracker: DirtyTracker
) -> AbstractContextManager[_Screen]:
    if args.json:
        return nullcontext(_Json(tracker))
    lines = _Lines(args.top)
    lines.begin(target, tracker)
    if sys.stdout.isatty():
        with suppress(ImportError):
            from pyuffd.cli._table import Table

            return Table(args.top, args.pid)
        print("(a live table needs rich: pip install 'pyuffd[cli]')")
    return nullcontext(lines)


class _Json:
    """One JSON object per round."""

    def __init__(self, tracker: DirtyTracker) -> None:
        self._tracker = tracker

    def show(self, sample: Sample, number: int) -> None:
        """Print a round."""
        blind: dict[str, int] = {}
        for gap in self._tracker.blind:
            blind[gap.reason.value] = blind.get(gap.reason.value, 0) + gap.length
        line: dict[str, Any] = {
            "seconds": round(sample.seconds, 3),
            "written_bytes": sample.written_bytes,
            "dropped_bytes": sample.dropped_bytes,
            "dirty_bytes": {f"{window}s": size for window, size in sample.dirty_bytes.items()},
            "mappings": [
                {
                    "start": part.start,
                    "end": part.end,
                    "name": part.name,
                    "written_bytes": part.written_bytes,
                }
                for part in sample.parts
            ],
            "blind_bytes": blind,
        }
        print(json.dumps(line), flush=True)


class _Lines:
    """Plain lines, if stdout is not a terminal."""

    def __init__(self, top: int) -> None:
        self._top = top

    def begin(self, target: Process, tracker: DirtyTracker) -> None:
        """Say what is tracked, and what cannot be seen."""
        print(f"process {target.pid}, {tracker.method}: {tracker.reason}")
        by_reason: dict[str, list[int]] = {}
        for gap in tracker.blind:
            by_reason.setdefault(gap.reason.value, []).append(gap.length)
        for reason, sizes in sorted(by_reason.items()):
            what = f"{counted(len(sizes), 'range')}, {sum(sizes) / MIB:.1f} MiB"
            print(f"cannot be seen: {reason}: {what}")
        sys.stdout.flush()

    def show(self, sample: Sample, number: int) -> None:
        """Print a round."""
        dirty = ", ".join(
            f"{size / MIB:.2f} MiB in {window} s" for window, size in sample.dirty_bytes.items()
        )
        parts = "; ".join(
            f"{part.name} {part.written_bytes / MIB:.2f}"
            for part in sample.parts[: min(self._top, 3)]
        )
        print(
            f"{sample.seconds:8.1f} s  {sample.rate / MIB:9.2f} MiB/s  dirty {dirty}"
            + (f"  ({parts})" if parts else ""),
            flush=True,
        )
