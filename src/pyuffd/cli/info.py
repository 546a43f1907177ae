"""`pyuffd info`: what a snapshot is of (layer L6)."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyuffd import RunState, Snapshot
from pyuffd.cli._progress import MIB

REGIONS_SHOWN = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `info` command."""
    parser = subparsers.add_parser(
        "info",
        description="Show what a snapshot is of: the process, the instant, its parents, and its"
        " largest mappings. Checks the tables, not the content (see `pyuffd verify`).",
        epilog="Exit status: 0, 2 if it is damaged or no snapshot.",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show it."""
    with Snapshot.open(args.directory) as snapshot:
        facts = _facts(snapshot)
    if args.json:
        print(json.dumps(facts))
        return 0
    target = facts["target"]
    print(f"snapshot {facts['id']} of process {target['pid']} ({target['name']}), {target['exe']}")
    print(f"taken {facts['instant']}, {facts['method']}: {facts['reason']}")
    print(f"kernel {facts['kernel']}, checksums {facts['checksum']}")
    parents = "1 parent" if facts["depth"] == 1 else f"{facts['depth']} parents"
    print(f"incremental, {parents}" if facts["depth"] else "complete, without parents")
    for state, size in facts["bytes"].items():
        print(f"{state:>10} {size / MIB:12.2f} MiB")
    print("largest mappings:")
    for region in sorted(facts["regions"], key=lambda each: -int(each["length"]))[:REGIONS_SHOWN]:
        name = region["path"] or region["kind"]
        size = region["length"] / MIB
        print(f"{region['start']:16x} {size:12.2f} MiB {region['permissions']} {name}")
    for gap in facts["gaps"]:
        if gap["reason"] != "special":
            print(f"gap: {gap['reason']}, {gap['length'] / MIB:.2f} MiB {gap['detail']}")
    return 0


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    sizes = {state.value: 0 for state in RunState}
    for run_ in snapshot.runs:
        sizes[run_.state.value] += run_.length
    kept = ("id", "parent", "target", "kernel", "instant", "method", "reason", "checksum")
    return {
        **{key: snapshot.manifest[key] for key in kept},
        "compression": snapshot.manifest["compression"],
        "facts": snapshot.manifest["facts"],
        "depth": snapshot.depth,
        "bytes": sizes,
        "regions": snapshot.manifest["regions"],
        "gaps": snapshot.manifest["gaps"],
    }
