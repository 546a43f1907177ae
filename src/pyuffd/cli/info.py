"""`pyuffd info`: describe a snapshot (layer L6)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any

from pyuffd import RunState, Snapshot, WorkingSet
from pyuffd.cli._progress import MIB

REGIONS_SHOWN = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `info` command."""
    parser = subparsers.add_parser(
        "info",
        description="Describe a snapshot: the process, the instant, its parents, its largest"
        " mappings, and its working sets. Checks the tables, not the content (see `pyuffd"
        " verify`).",
        epilog="Exit status: 0, or 2 if the snapshot is damaged or not a snapshot, or has no"
        " working set to draw. --png needs matplotlib (pip install 'pyuffd[plot]').",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--png",
        metavar="FILE",
        help="draw a working set: where it is in the mappings, and in which order it was touched",
    )
    parser.add_argument(
        "--working-set",
        metavar="NAME",
        help="with --png: which one to draw (default: the first usable one)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    if args.png and importlib.util.find_spec("matplotlib") is None:
        print("pyuffd: --png needs matplotlib: pip install 'pyuffd[plot]'", file=sys.stderr)
        return 2
    with Snapshot.open(args.directory) as snapshot:
        sets = snapshot.working_sets()
        facts = _facts(snapshot, sets)
        if args.png and not _draw(args.png, snapshot, sets, args.working_set):
            return 2
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
    for name, known in facts["working_sets"].items():
        if known["problem"]:
            print(f"working set {name} is not used: {known['problem']}")
            continue
        times = "once" if known["recordings"] == 1 else f"{known['recordings']} times"
        print(
            f"working set {name}: {known['bytes'] / MIB:.2f} MiB in {known['runs']} runs, recorded"
            f" {times}; {known['often_bytes'] / MIB:.2f} MiB of it mostly touched"
        )
    return 0


def _draw(path: str, snapshot: Snapshot, sets: dict[str, WorkingSet], name: str | None) -> bool:
    from pyuffd.cli import _hot_map

    if name is None:
        name = next((each for each, known in sets.items() if not known.problem), None)
    known = None if name is None else sets.get(name)
    if known is None or known.problem:
        why = f": {known.problem}" if known is not None else ""
        what = "working set" if name is None else f"working set {name}"
        print(f"pyuffd: {snapshot.path} has no {what} to draw{why}", file=sys.stderr)
        return False
    title = f"working set {name} of process {snapshot.manifest['target']['pid']}"
    _hot_map.draw(path, title, snapshot.regions, known)
    return True


def _facts(snapshot: Snapshot, sets: dict[str, WorkingSet]) -> dict[str, Any]:
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
        "working_sets": {
            name: {
                "recordings": known.recordings,
                "runs": len(known),
                "bytes": known.length,
                "often_bytes": sum(run.length for run in known.often()),
                "problem": known.problem,
            }
            for name, known in sets.items()
        },
    }
