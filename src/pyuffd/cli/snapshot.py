"""`pyuffd snapshot`: save the memory of a running process at one instant (layer L6)."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict

from pyuffd import Process, Snapshot, SnapshotReport, UffdOSError
from pyuffd.cli._expected import limited_pause, shared_memory, whole_pause
from pyuffd.cli._progress import MIB, progress_shown, until_named
from pyuffd.cli._signals import ended_by
from pyuffd.cli._words import pid, seconds

MAX_STALL_S = 0.05  # without --max-stall
GAPS_SHOWN = 5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `snapshot` command."""
    parser = subparsers.add_parser(
        "snapshot",
        description="Write the memory of a running process, as it is at one instant, to a new"
        " directory. The process needs no preparation, and continues to run after a pause.",
        epilog="Exit status: 0 when the snapshot is complete; 2 on an error, 130 after Ctrl-C, 143"
        " after SIGTERM and 129 after SIGHUP, and no directory is left; 141 if the reader of stdout"
        " is gone, and a directory may be left. A signal that arrives when the snapshot is complete"
        " is ignored. The process continues to run in any case.",
    )
    parser.add_argument("pid", type=pid, metavar="PID", help="the process, or one of its threads")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the directory to create"
    )
    parser.add_argument(
        "--method",
        choices=("auto", "precopy", "cow", "stopped"),
        default="auto",
        help="precopy copies while the process runs, and the last pages while it is stopped; cow"
        " stops it briefly, then saves each page before its first write; stopped copies everything"
        " while it is stopped",
    )
    parser.add_argument(
        "--parent", metavar="DIR", help="an earlier snapshot of this process: write only changes"
    )
    parser.add_argument(
        "--shared",
        choices=("refuse", "pause", "skip"),
        default="refuse",
        help="memory that other processes may write: refuse it, copy it while the process is"
        " stopped, or leave it out",
    )
    parser.add_argument(
        "--max-stall",
        type=seconds(0.001, 3600),
        metavar="S",
        help="give up if the process would be stopped for more than S seconds (0.05; no limit with"
        " stopped, or for shared memory that is read while it is stopped)",
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="MIB", help="copy at most this many MiB per second"
    )
    parser.add_argument(
        "--no-sync", action="store_true", help="do not wait until everything is on the disk"
    )
    parser.add_argument(
        "--compress",
        type=int,
        nargs="?",
        const=3,
        metavar="LEVEL",
        help="compress by zstd, 1 to 22 (3); needs zstandard: pip install 'pyuffd[snapshot]'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above zero")
    return value * MIB


def run(args: argparse.Namespace) -> int:
    """Take the snapshot."""
    try:
        with ended_by(signal.SIGTERM, signal.SIGHUP), Process(args.pid) as target:
            if not args.json:
                print(_announcement(args, target), flush=True)
            with progress_shown(quiet=args.json) as shown:
                report = Snapshot.take(
                    target,
                    args.output,
                    method=args.method,
                    shared=args.shared,
                    parent=args.parent,
                    max_stall_s=args.max_stall,
                    rate=args.rate,
                    durable=not args.no_sync,
                    compress=args.compress,
                    progress=until_named(shown),
                )
            print(json.dumps(asdict(report)) if args.json else _table(report))
    except UffdOSError as error:
        if args.method != "auto" or not error.op.startswith("userfaultfd in the target"):
            raise
        ways = (error.hint, "or --method stopped, which needs no userfaultfd")
        raise error.with_hint("; ".join(filter(None, ways))) from None
    except ValueError as error:
        print(f"pyuffd: {error}", file=sys.stderr)
        return 2
    return 0


def _announcement(args: argparse.Namespace, target: Process) -> str:
    mappings = target.mappings()
    own = [m for m in mappings if not m.shared]
    size = sum(m.length for m in own) / MIB
    if args.method == "stopped":
        pause = f"it will be stopped while all of it is copied, {whole_pause(target):.2f} s or more"
    else:
        is_agreed = args.shared == "pause" and args.max_stall is None
        shared = shared_memory(target) if is_agreed else 0
        limit_s = args.max_stall or MAX_STALL_S
        pause = f"it will be stopped {limited_pause(target, limit_s, shared=shared)}"
    return f"process {target.pid}: {len(own)} private mappings of {size:.0f} MiB; {pause}"


def _table(report: SnapshotReport) -> str:
    seconds = max(report.seconds, 1e-9)
    rows = [
        ("snapshot", report.path),
        ("method", f"{report.method}: {report.reason}"),
        ("pause", f"{report.pause_s * 1e3:.1f} ms, {report.stop_bytes / MIB:.1f} MiB read in it"),
        ("rounds", f"{report.rounds} before it"),
        ("content", f"{report.bytes / MIB:.1f} MiB"),
        ("time", f"{report.seconds:.2f} s, {report.bytes / MIB / seconds:.0f} MiB/s"),
    ]
    if report.method == "cow":
        waited = f"{report.longest_wait_s * 1e3:.2f} ms"
        rows[3:4] = [
            ("saved", f"{report.faults} pages by faults, {report.swept} by the sweep"),
            ("longest wait", waited),
            ("dropped", f"{report.dropped / MIB:.1f} MiB, by the process before they were saved"),
        ]
    lines = [f"{name:>13}  {text}" for name, text in rows]
    gaps = [gap for gap in report.gaps if gap.reason != "special"]
    for gap in gaps[:GAPS_SHOWN]:
        lines.append(f"{'gap':>13}  {gap.reason}: {gap.length / MIB:.1f} MiB {gap.detail}")
    if len(gaps) > GAPS_SHOWN:
        lines.append(f"{'':>13}  and {len(gaps) - GAPS_SHOWN} more gaps")
    return "\n".join(lines)
