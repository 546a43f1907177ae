"""`pyuffd core`: an ELF core of a running process (layer L6)."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from pyuffd import (
    CoreFile,
    DirtyTracker,
    Process,
    ProcessGoneError,
    Snapshot,
    UffdOSError,
    probe,
    write_core,
)
from pyuffd.cli._counted import counted
from pyuffd.cli._expected import (
    has_shared_files,
    limited_pause,
    resident,
    shared_memory,
    whole_pause,
)
from pyuffd.cli._progress import MIB, progress_shown, until_named
from pyuffd.cli._signals import ended_by
from pyuffd.cli._words import pid, seconds

METHODS = ("auto", "precopy", "cow", "stopped")
# The default limit of write_core.
STALL_S = 0.05


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `core` command."""
    parser = subparsers.add_parser(
        "core",
        description="Write an ELF core of a running process: its memory and the registers of all"
        " its threads at one instant. The process continues to run. gdb, lldb, eu-stack, drgn,"
        " pystack and py-spy open the core as they open that of a crash.",
        epilog="Exit status: 0 when the core is complete; 2 on an error, 130 after Ctrl-C, 143"
        " after SIGTERM and 129 after SIGHUP, and no file is left; 141 if the reader of stdout is"
        " gone, and a file may be left. A signal that arrives when the core is complete is ignored."
        " The process continues to run in any case. The file has mode 0600, and never replaces"
        " another. A progress bar needs rich (pip install 'pyuffd[cli]').",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "pid", type=pid, nargs="?", metavar="PID", help="the process, or one of its threads"
    )
    what.add_argument(
        "--from", dest="snapshot", metavar="DIR", help="a snapshot instead of a process; needs -o"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (core.PID)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="write all readable memory, even what coredump_filter and MADV_DONTDUMP leave out",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="precopy copies while the process runs, and the last pages while it is stopped; cow"
        " stops it briefly, then saves each page before its first write; stopped copies everything"
        " while it is stopped; auto (the default) tries them in this order",
    )
    parser.add_argument(
        "--max-stall",
        type=seconds(1e-6, 1e9),
        metavar="S",
        help="give up if the process would be stopped for more than S seconds (without it, auto may"
        " end with a long stop, and reading shared memory has no limit)",
    )
    parser.add_argument("--sync", action="store_true", help="wait until the file is on the disk")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the core."""
    try:
        if args.snapshot is not None:
            return _run_from(args)
        with ended_by(signal.SIGTERM, signal.SIGHUP), Process(args.pid) as target:
            path = f"core.{target.pid}" if args.output is None else args.output
            if not args.json:
                print(_announcement(args, target), flush=True)
            with progress_shown(quiet=args.json) as shown:
                core = write_core(
                    target,
                    path,
                    method=args.method,
                    full=args.full,
                    max_stall_s=args.max_stall,
                    durable=args.sync,
                    progress=until_named(shown),
                )
            _print(args, core)
    except ValueError as error:
        print(f"pyuffd: {error}", file=sys.stderr)
        return 2
    return 0


def _run_from(args: argparse.Namespace) -> int:
    """Write the core of a snapshot."""
    if args.full or args.method != "auto" or args.max_stall is not None:
        raise ValueError("--from: --full, --method and --max-stall are for running processes")
    if args.output is None:
        raise ValueError("--from needs -o FILE")
    with ended_by(signal.SIGTERM, signal.SIGHUP), Snapshot.open(args.snapshot) as snapshot:
        with progress_shown(quiet=args.json) as shown:
            core = snapshot.write_core(args.output, durable=args.sync, progress=until_named(shown))
        _print(args, core)
    return 0


def _print(args: argparse.Namespace, core: CoreFile) -> None:
    if args.json:
        print(json.dumps(_as_json(core)))
    else:
        _show(core)


def _announcement(args: argparse.Namespace, target: Process) -> str:
    """Say which process is stopped, and estimate for how long."""
    size = resident(target.memory_tid)
    name = Path(f"/proc/{target.pid}/comm").read_text(errors="replace")
    name = "".join(c if c.isprintable() else "?" for c in name[:-1])  # a process may set any name
    if args.method == "stopped":
        pause = f"while all memory is copied, {whole_pause(target):.2f} s or more"
    elif why := _why_untracked(args, target):
        pause = (
            f"while {size / MIB:.0f} MiB are copied, {whole_pause(target):.2f} s or more, as its"
            f" writes cannot be tracked here ({why}); with --method precopy there is no core then"
        )
    else:
        limit_s = args.max_stall or STALL_S
        files = args.full or has_shared_files(target)
        shared = 0 if args.max_stall else shared_memory(target, files=files)
        pause = limited_pause(target, limit_s, ", if it does not write too fast", shared)
    threads = counted(len(target.threads()), "thread")
    return (
        f"process {target.pid} ({name}), {threads}, {size / MIB:.1f} MiB of its own:"
        f" it will be stopped {pause}"
    )


def _why_untracked(args: argparse.Namespace, target: Process) -> str:
    """Return why auto will copy all of it in the stop; "" if it will not.

    It is tried only where this process may not open a userfaultfd either: trying stops the target.
    """
    if args.method != "auto" or args.max_stall is not None:
        return ""
    opens = probe().opens
    if opens["syscall"].works or opens["device"].works:
        return ""
    try:
        DirtyTracker(target, method="wp-async").close()
    except ProcessGoneError:
        raise
    except UffdOSError as error:
        return str(error)
    return ""


# What is printed


def _show(core: CoreFile) -> None:
    rate = core.bytes / MIB / core.seconds
    rows = [
        ("file", core.path),
        ("memory", f"{core.bytes / MIB:.1f} MiB, with holes {core.length / MIB:.1f}"),
        ("threads", str(core.threads)),
        ("mappings", str(core.mappings)),
        ("method", f"{core.method}: {core.reason}"),
        ("pause", f"{core.pause_s * 1e3:.1f} ms, {core.stop_bytes / MIB:.1f} MiB read in it"),
        ("total", f"{core.seconds:.3f} s, {rate:.0f} MiB/s"),
        *_gaps(core),
    ]
    width = max(len(what) for what, _ in rows)
    for what, text in rows:
        print(f"{what:<{width}}  {text}")


def _gaps(core: CoreFile) -> list[tuple[str, str]]:
    gaps = []
    if len(core.lost):
        gaps.append(("not readable", f"{core.lost.bytes / MIB:.1f} MiB, zeros in the file"))
    if core.unseen:
        size = sum(mapping.length for mapping in core.unseen)
        text = f"{size / MIB:.1f} MiB of shared memory, except what the process has touched"
        gaps.append(("not seen", f"{text} (needs CAP_CHECKPOINT_RESTORE)"))
    if core.filtered:
        text = f"{', '.join(core.filtered)}, by the process's coredump_filter"
        gaps.append(("left out", f"{text}: --full writes all"))
    if core.partial:
        tids = ", ".join(map(str, core.partial))
        gaps.append(("registers missing", f"of threads that wait in vfork: {tids}"))
    return gaps


def _as_json(core: CoreFile) -> dict[str, Any]:
    return {
        "path": core.path,
        "method": core.method,
        "threads": core.threads,
        "mappings": core.mappings,
        "bytes": core.bytes,
        "length": core.length,
        "reason": core.reason,
        "pause_s": round(core.pause_s, 6),
        "stop_bytes": core.stop_bytes,
        "seconds": round(core.seconds, 6),
        "lost_bytes": core.lost.bytes,
        "unseen_bytes": sum(mapping.length for mapping in core.unseen),
        "partial_threads": list(core.partial),
        "filtered": list(core.filtered),
    }
