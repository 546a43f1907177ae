"""`pyuffd flatten`: merge an incremental snapshot and its parents into one (layer L6)."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from pyuffd import Snapshot
from pyuffd.cli._progress import progress_shown, until_named
from pyuffd.cli._signals import ended_by


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `flatten` command."""
    parser = subparsers.add_parser(
        "flatten",
        description="Write the content of an incremental snapshot as one snapshot without parents."
        " Everything is checked on the way; the parents may be deleted afterwards.",
        epilog="Exit status: 0 when the new snapshot is complete; 2 on an error, 130 after Ctrl-C,"
        " 143 after SIGTERM and 129 after SIGHUP, and no directory is left. A signal that arrives"
        " when the snapshot is complete is ignored.",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the directory to create"
    )
    parser.add_argument(
        "--no-sync", action="store_true", help="do not wait until everything is on the disk"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the new snapshot."""
    with ended_by(signal.SIGTERM, signal.SIGHUP), Snapshot.open(args.directory) as snapshot:
        depth, durable = snapshot.depth, not args.no_sync
        with progress_shown(quiet=args.json) as shown:
            try:
                new = snapshot.flatten(args.output, durable=durable, progress=until_named(shown))
            except ValueError as error:
                print(f"pyuffd: {error}", file=sys.stderr)
                return 2
        if args.json:
            print(json.dumps({"path": args.output, "id": new, "depth": depth}))
        else:
            print(f"{args.output}: {new}, of {depth + 1} snapshots")
    return 0
