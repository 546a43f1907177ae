"""`pyuffd verify`: check a snapshot against its checksums (layer L6)."""

from __future__ import annotations

import argparse
import json
import sys

from pyuffd import Snapshot, SnapshotFormatError
from pyuffd.cli._progress import progress_shown

EXIT_DAMAGED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `verify` command."""
    parser = subparsers.add_parser(
        "verify",
        description="Read a snapshot and its parents, and compare everything with the checksums.",
        epilog="Exit status: 0 if all is as it was written, 1 if something is damaged or missing, 2"
        " on another error, 130 after Ctrl-C.",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check the snapshot."""
    error: SnapshotFormatError | None = None
    try:
        with Snapshot.open(args.directory) as snapshot, progress_shown(quiet=args.json) as shown:
            snapshot.verify(shown)
    except SnapshotFormatError as caught:
        error = caught
    if args.json:
        print(
            json.dumps(
                {
                    "good": error is None,
                    "error": None if error is None else str(error),
                    "path": None if error is None else error.path,
                    "offset": None if error is None else error.offset,
                }
            )
        )
    elif error is None:
        print(f"{args.directory}: good")
    else:
        print(f"pyuffd: {error}", file=sys.stderr)
    return 0 if error is None else EXIT_DAMAGED
