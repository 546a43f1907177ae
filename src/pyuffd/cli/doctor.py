"""`pyuffd doctor`: what this kernel and this user can do, on one page or as JSON (layer L6)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from pyuffd.cli._report import make_report, size_text
from pyuffd.cli._report_types import Mode, Report

WIDTH = 100
LABEL = 17  # the first column: the longest memory type and the longest knob fit

EXIT_USABLE = 0
EXIT_UNUSABLE = 1

_BOLD, _RED, _GREEN, _YELLOW = "1", "31", "32", "33"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser(
        "doctor",
        description="Report what this kernel and this user can do with userfaultfd, found by"
        " trying, and the command for each thing that is missing.",
        epilog="Exit status: 0 if a userfaultfd can be opened in any way, 1 if not, 2 on an error."
        " NO_COLOR disables colours.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, as docs/doctor.md describes it"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if userfaultfd can be used, else 1."""
    report = make_report()
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for line in _Page(report, colour=_wants_colour(sys.stdout)).lines():
            print(line.rstrip())
    return EXIT_USABLE if report.usable else EXIT_UNUSABLE


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Page:
    def __init__(self, report: Report, *, colour: bool) -> None:
        self._report = report
        self._colour = colour

    def lines(self) -> Iterator[str]:
        yield from self._head()
        for title, body in (
            ("Ways to open", self._ways()),
            ("Features", self._features()),
            ("Ioctls of a registered range, by memory type and register mode", self._memory()),
            ("Machine", self._machine()),
            ("Missing, and the command by which root provides it", self._missing()),
        ):
            lines = list(body)
            if lines:
                yield ""
                yield self._paint(title, _BOLD)
                yield from lines

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text.strip() else text

    def _row(self, label: str, text: str, colour: str = "") -> Iterator[str]:
        """Yield a labelled paragraph, wrapped in its own column."""
        room = WIDTH - LABEL - 4
        for number, line in enumerate(_wrap(text, room)):
            shown = f"{'' if number else label:{LABEL}}"
            yield f"  {shown}  {self._paint(line, colour) if colour else line}"

    def _head(self) -> Iterator[str]:
        report = self._report
        yield (
            f"pyuffd {report.pyuffd} on Linux {report.kernel.release} ({report.kernel.machine}),"
            f" as uid {report.user.uid}"
        )
        yield ""
        if report.kernel_faults:
            verdict = "userfaultfd works here, for faults of user code and of system calls."
            yield self._paint(verdict, _GREEN)
        elif report.usable:
            yield self._paint("userfaultfd works here with user_mode_only=True only:", _YELLOW)
            yield "a system call that touches a missing page fails with EFAULT instead of waiting."
        else:
            yield self._paint("userfaultfd cannot be used here.", _RED)

    def _ways(self) -> Iterator[str]:
        for name, way in self._report.open.items():
            if way.works:
                yield from self._row(name, "yes", _GREEN)
            else:
                yield from self._row(name, f"{way.errno}: {way.reason}", _RED)

    def _features(self) -> Iterator[str]:
        features = self._report.features
        if not self._report.usable:
            yield from self._row("mask", "unknown: no userfaultfd can be opened")
        else:
            yield from self._row("mask", features.mask)
            granted = [name for name in features.supported if name not in features.refused]
            yield from self._row("yes", " ".join(granted), _GREEN)
            for label, names, colour in (
                ("not for this user", features.refused, _RED),
                ("no", features.missing, _YELLOW),
            ):
                if names:
                    yield from self._row(label, " ".join(names), colour)
            if int(features.unknown, 16):
                yield from self._row("without a name", features.unknown)
        scan = self._report.pagemap_scan
        yield from self._row("PAGEMAP_SCAN", " ".join(scan.names) or "no")

    def _memory(self) -> Iterator[str]:
        memory_types = self._report.memory_types
        if not self._report.usable:
            return
        masks: dict[str, Mode] = {}
        yield from self._row("", "".join(f"{name:9}" for name in memory_types["anon"]).rstrip())
        for memory_type, modes in memory_types.items():
            cells = ""
            for mode in modes.values():
                if mode.works:
                    masks[mode.mask] = mode
                cells += f"{mode.mask if mode.works else mode.errno:9}"
            yield from self._row(memory_type, cells.rstrip())
        for mask in sorted(masks, key=lambda text: int(text, 16)):
            yield from self._row(f"{mask:>{LABEL}}", " ".join(masks[mask].ioctls))
        if any("MOVE" in mode.ioctls for mode in memory_types["shmem"].values()):
            yield from self._row(
                "", "The kernel sets MOVE for shmem too, but moves anonymous memory only."
            )

    def _machine(self) -> Iterator[str]:
        report = self._report
        memory, swap, limits = report.memory, report.swap, report.limits
        yield from self._row(
            "memory", f"{size_text(memory.available)} available of {size_text(memory.total)}"
        )
        yield from self._row(
            "swap",
            f"{size_text(swap.free)} free of {size_text(swap.total)}" if swap.total else "none",
        )
        yield from self._row("control group", self._cgroup())
        yield from self._row("CPUs", f"{report.cpus.usable} usable of {report.cpus.online}")
        for pool in report.huge_pages:
            promised = f", {pool.reserved} of them reserved" if pool.reserved else ""
            yield from self._row(
                f"{size_text(pool.size)} pages", f"{pool.free} free of {pool.total}{promised}"
            )
        yield from self._row("hugetlbfs", " ".join(report.hugetlbfs) or "not mounted")
        if report.shm.total is not None and report.shm.free is not None:
            yield from self._row(
                "/dev/shm", f"{size_text(report.shm.free)} free of {size_text(report.shm.total)}"
            )
        yield from self._row(
            "THP",
            f"{report.thp.enabled or 'not built in'},"
            f" for shmem {report.thp.shmem_enabled or 'not built in'}",
        )
        yield from self._row(
            "limits",
            f"memlock {_limit_size(limits.memlock_soft)},"
            f" open files {limits.nofile_soft or 'unlimited'},"
            f" vm.max_map_count {limits.max_map_count}, vm.nr_hugepages {limits.nr_hugepages},"
            f" vm.overcommit_memory {limits.overcommit_memory},"
            f" vm.unprivileged_userfaultfd {limits.unprivileged_userfaultfd}",
        )
        user = report.user
        rights = " ".join(user.capabilities) or "no capability that matters here"
        rights += ", in a user namespace" if user.user_namespace else ""
        rights += ", under a seccomp filter" if user.seccomp_filter else ""
        yield from self._row("rights", rights)
        yield from self._row("Python", self._python())

    def _cgroup(self) -> str:
        cgroup = self._report.cgroup
        found = [
            f"{name} {size_text(limit)}"
            for name, limit in (
                ("memory", cgroup.memory),
                ("swap", cgroup.swap),
                ("2 MiB pages", cgroup.hugetlb_2m),
            )
            if limit is not None
        ]
        if cgroup.cpus is not None:
            found.append(f"{cgroup.cpus:g} CPUs")
        return ", ".join(found) or "no limits"

    def _python(self) -> str:
        python = self._report.python
        lock = (
            "faulting while holding the GIL stops all Python threads"
            if python.gil
            else "the GIL is off"
        )
        build = " free-threaded" if python.free_threaded_build else ""
        return f"{python.implementation} {python.version}{build}: {lock}"

    def _missing(self) -> Iterator[str]:
        for missing in self._report.missing:
            yield from _wrap(f"{missing.what}: {missing.why}", WIDTH - 2, indent="  ")
            if missing.command:
                # Backslashes let the user copy the lines and run them.
                lines = _wrap(missing.command, WIDTH - 8, keep_words=True)
                for number, line in enumerate(lines):
                    more = " \\" if number + 1 < len(lines) else ""
                    yield f"    {'  ' if number else '# '}{self._paint(line, _BOLD)}{more}"


def _limit_size(limit: int | None) -> str:
    return "unlimited" if limit is None else size_text(limit)


def _wrap(text: str, width: int, *, indent: str = "", keep_words: bool = False) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=not keep_words,
        break_on_hyphens=False,
    ) or [indent]
