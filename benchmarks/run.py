"""Run the benchmarks: ``python -m benchmarks.run [--json FILE] [--only NAME] [--quick]``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import (
    bench_busy_machine,
    bench_dirty_scan,
    bench_fault_latency,
    bench_process,
    bench_restore,
    bench_size,
    bench_snapshot,
    bench_throughput,
    bench_tracking,
    bench_verbs,
    bench_working_set,
)
from benchmarks._build import build
from benchmarks._pairs import MemberError, Row, Skipped
from benchmarks._report import Table, as_json, as_markdown, environment
from benchmarks._setup import Setup, available_memory, warm_memory

_BENCHMARKS = {
    "fault_latency": bench_fault_latency.run,
    "busy_machine": bench_busy_machine.run,
    "throughput": bench_throughput.run,
    "dirty_scan": bench_dirty_scan.run,
    "tracking": bench_tracking.run,
    "verbs": bench_verbs.run,
    "size": bench_size.run,
    "process": bench_process.run,
    "snapshot": bench_snapshot.run,
    "restore": bench_restore.run,
    "working_set": bench_working_set.run,
}
_ROUNDS = 9
_QUICK_ROUNDS = 5
#: Both members of a pair keep a source of 1 GiB, and one at a time a region; cores and snapshots of
#: 1 GiB are files in the page cache.
_WARM = 10 << 30
_QUICK_WARM = 1 << 30


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE")
    parser.add_argument(
        "--only", action="append", choices=_BENCHMARKS, help="run only this one (may be repeated)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="less memory and fewer faults and rounds"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="counted runs of each pair")
    return parser.parse_args()


def main() -> int:
    """Run the benchmarks asked for; return 1 if one of them did not finish."""
    args = _arguments()
    # Like Ctrl-C, so that huge pages are put back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cpus = sorted(os.sched_getaffinity(0))
    where = environment()
    rows: list[Row | Skipped] = []
    failed = False
    table = Table()
    wanted = _QUICK_WARM if args.quick else _WARM
    warm = min(wanted, available_memory() // 2)
    with (
        tempfile.TemporaryDirectory(prefix="pyuffd-bench-") as directory,
        warm_memory(warm),
    ):
        setup = Setup(
            programs=build(Path(directory)),
            rounds=args.rounds or (_QUICK_ROUNDS if args.quick else _ROUNDS),
            quick=args.quick,
            faulter_cpu=cpus[0],
            other_cpu=cpus[1] if len(cpus) > 1 else None,
        )
        for name in args.only or _BENCHMARKS:
            try:
                for row in _BENCHMARKS[name](setup):
                    rows.append(row)
                    table.add(row)
            except MemberError as error:
                failed = True
                print(f"{name}: {error}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(as_json(rows, where), indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(as_markdown(rows, where))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
