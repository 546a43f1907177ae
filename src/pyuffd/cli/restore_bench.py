"""`pyuffd restore-bench`: find the fastest way to restore a snapshot here (layer L6)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from pyuffd import (
    PagePoisonedError,
    Region,
    RunState,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    SnapshotRegion,
    UffdPermissionError,
)
from pyuffd.cli._progress import MIB

Mode = Literal["copy", "minor", "map", "auto"]
MODES: tuple[Mode, ...] = ("copy", "minor", "map", "auto")
HUGE_RESERVATION = 256 << 30
PAGE, PIECE = 4096, 1 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `restore-bench` command."""
    parser = subparsers.add_parser(
        "restore-bench",
        description="Restore a snapshot into memory of this process by each method, and show how"
        " long each takes, compared with reading the files into memory at once.",
        epilog="Exit status: 0, 2 on an error, 130 after Ctrl-C. Needs as much memory as the"
        " snapshot has content.",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot")
    parser.add_argument(
        "--mode",
        action="append",
        choices=MODES,
        help="only this method; may be repeated (default: all)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="drop the snapshot from the page cache before each method",
    )
    parser.add_argument(
        "--verify",
        choices=("drain", "first", "no"),
        default="drain",
        help="when checksums are compared (default: drain)",
    )
    parser.add_argument("--threads", type=int, help="threads that fill (default: one per CPU)")
    parser.add_argument("--rounds", type=int, default=1, help="repeat, and show the best round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure the methods, and print a table."""
    for name in ("rounds", "threads"):
        if (value := getattr(args, name)) is None or value > 0:
            continue
        print(f"pyuffd: --{name} {value} is not positive", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with Snapshot.open(args.directory) as snapshot:
        paths = list(_files(snapshot))
        if not _with_content(snapshot):
            print(f"pyuffd: {args.directory} has no content", file=sys.stderr)
            return 2
    for mode in (None, *(args.mode or MODES)):
        found = [_one(args, mode, paths) for _ in range(args.rounds)]
        rows.append(min(found, key=lambda row: row.get("touched_s", 0.0)))
    if all("refused" in row for row in rows[1:]):
        print(f"pyuffd: {rows[1]['refused']}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"snapshot": args.directory, "cold": args.cold, "rows": rows}))
        return 0
    print(
        f"{'':>8} {'ready':>10} {'1st access':>10} {'in place':>10} {'all read':>10} {'MiB/s':>8}"
    )
    for row in rows:
        if "refused" in row:
            print(f"{row['name']:>8} {row['refused']}")
            continue
        print(
            f"{row['name']:>8} {row['ready_s'] * 1e3:7.2f} ms {row['first_s'] * 1e3:7.2f} ms"
            f" {row['placed_s'] * 1e3:7.1f} ms {row['touched_s'] * 1e3:7.1f} ms"
            f" {row['bytes'] / MIB / row['touched_s']:10.0f}"
        )
        if row["name"] == "auto":
            print(f"{'':>8} auto is {row['method']}: {row['why']}")
    return 0


def _files(snapshot: Snapshot) -> Iterator[str]:
    """Yield the files of a snapshot and its parents."""
    for path in snapshot.directories:
        yield os.path.join(path, "pages")


def _with_content(snapshot: Snapshot) -> list[SnapshotRegion]:
    """Return the regions that have content, without reservations of address space."""
    have = [run.start for run in snapshot.runs if run.state in (RunState.DATA, RunState.PARENT)]
    found, at = [], 0
    for region in snapshot.regions:
        while at < len(have) and have[at] < region.start:
            at += 1
        if at < len(have) and have[at] < region.end and region.length <= HUGE_RESERVATION:
            found.append(region)
    return found


def _drop(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _memory(snapshot: Snapshot) -> Iterator[dict[SnapshotRegion, Region]]:
    with ExitStack() as stack:
        yield {
            where: stack.enter_context(Region.anonymous(where.length, noreserve=True))
            for where in _with_content(snapshot)
        }


def _one(args: argparse.Namespace, mode: Mode | None, paths: list[str]) -> dict[str, Any]:
    """Measure one method; None reads the files into memory."""
    if args.cold:
        _drop(paths)
    if mode is None:
        return _read(paths)
    with Snapshot.open(args.directory) as snapshot, _memory(snapshot) as memory:
        began = time.perf_counter()
        try:
            restore = snapshot.restore(
                memory, mode=mode, gaps="zeros", verify=args.verify, threads=args.threads
            )
        except SnapshotFormatError:
            raise
        except UffdPermissionError:
            why = "needs a userfaultfd, which this user may not open: see `pyuffd doctor`"
            return {"name": mode, "refused": why}
        except (ValueError, SnapshotError) as error:
            return {"name": mode, "refused": str(error)}
        with restore:
            ready = time.perf_counter()
            try:
                next(iter(memory.values())).touch(0, 1)
            except PagePoisonedError:
                restore.wait()  # raises, as filling in the background found the damage first
                raise
            first = time.perf_counter()
            restore.wait()
            placed = time.perf_counter()
            for region in memory.values():
                region.touch()
            touched = time.perf_counter()
            stats = restore.stats
            return {
                "name": mode,
                "method": restore.method,
                "why": restore.why,
                "bytes": restore.progress.total,
                "ready_s": ready - began,
                "first_s": first - began,
                "placed_s": placed - began,
                "touched_s": touched - began,
                "faults": stats.faults,
                "fault_p99_us": stats.fault_p99_us,
            }


def _read(paths: list[str]) -> dict[str, Any]:
    """Read all data of the files into new memory at once, as an eager restore does."""
    data = [(path, *span) for path in paths for span in _data(path)]
    size = sum(end - start for _, start, end in data)
    with Region.anonymous(-(-size // PAGE) * PAGE, noreserve=True) as memory:
        view = memory.memoryview()
        began = time.perf_counter()
        done = 0
        for path, start, end in data:
            with open(path, "rb", buffering=0) as file:
                while start < end:
                    got = os.preadv(
                        file.fileno(), [view[done : done + min(PIECE, end - start)]], start
                    )
                    if not got:
                        break
                    start, done = start + got, done + got
        seconds = time.perf_counter() - began
        view.release()
    return {
        "name": "read",
        "bytes": size,
        "ready_s": seconds,
        "first_s": seconds,
        "placed_s": seconds,
        "touched_s": seconds,
    }


def _data(path: str) -> Iterator[tuple[int, int]]:
    """Yield the data ranges of a sparse file."""
    with open(path, "rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            stop = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            yield at, stop
            at = stop
