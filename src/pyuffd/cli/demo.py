"""`pyuffd demo`: snapshot a running process, restore it lazily, check every byte (layer L6)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pyuffd.cli import _demo_program as programs
from pyuffd.cli import _demo_restore as restoring
from pyuffd.cli._demo_restore import DRIVERS, LABELS, Restored
from pyuffd.cli._demo_snapshot import Snapshot, take_snapshot
from pyuffd.cli._demo_work import HUGE_PAGE, MIB, PAGE, WorkingSet, collect, open_userfaultfd
from pyuffd.cli._signals import ended_by
from pyuffd.testing import MEMORY_TYPES, MemoryType, huge_pages

WIDTH = 100
DEFAULT_SIZE_MIB = 64
MAX_SIZE_MIB = 1024

EXIT_VERIFIED = 0
EXIT_NOT_VERIFIED = 1

# Limits of the unprepared program's data.
PROGRAM_MIN, PROGRAM_MAX = MIB, 16 * MIB
PROGRAM_WORDS = {
    "full": "Snapshot    ",
    "incremental": "Increment   ",
    "core": "Core        ",
}

_BOLD, _RED, _GREEN = "1", "31", "32"

HEADINGS = (
    ("memory", "driver", "faults", "p50 us", "p99 us", "prefetched", "MiB/s", "verified"),
    ("", "", "served", "random read", "", "pages", "in order", ""),
)
ROW = "  {:<16} {:<7} {:>8} {:>10} {:>10} {:>12} {:>9}  {:<8}"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `demo` command."""
    parser = subparsers.add_parser(
        "demo",
        description="Write an image of a child process's memory at one instant, while the child"
        " continues to change it; restore the image lazily into every type of memory that this"
        " machine allows; compare every byte.",
        epilog="Exit status: 0 if everything that ran was verified, 1 if not, 2 on an error."
        " NO_COLOR disables colours.",
    )
    parser.add_argument(
        "--input",
        metavar="PATH",
        type=Path,
        help="file or directory to fill the memory from (default: Python's standard library)",
    )
    parser.add_argument(
        "--size",
        metavar="MIB",
        type=_size,
        default=DEFAULT_SIZE_MIB * MIB,
        help=f"use at most this much memory, 2 to {MAX_SIZE_MIB} (default: {DEFAULT_SIZE_MIB})",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the edits (default: 1)")


def _size(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= MAX_SIZE_MIB:
        raise argparse.ArgumentTypeError(f"{text} is not a number in 2..{MAX_SIZE_MIB}")
    return int(text) * MIB // HUGE_PAGE * HUGE_PAGE


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if everything that ran was verified, else 1."""
    with ended_by(signal.SIGTERM, signal.SIGHUP):
        return _Demo(args.input, args.size, args.seed).run()


class _Demo:
    def __init__(self, path: Path | None, limit: int, seed: int) -> None:
        self._path, self._limit, self._seed = path, limit, seed
        self._colour = (
            sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )
        self._left_out: dict[str, list[str]] = {}

    def run(self) -> int:
        uffd, refused = open_userfaultfd()  # raises if the demo cannot run here
        uffd.close()
        self._say("pyuffd demo: snapshot a running process, restore it lazily, check every byte")
        work = collect(self._path, self._limit)
        self._tell_work(work)
        with tempfile.TemporaryFile(prefix="pyuffd-demo-") as image:
            snapshot = take_snapshot(work, self._path, self._limit, self._seed, image)
            self._tell_snapshot(snapshot)
            rows = self._restore(image, snapshot)
        program = self._look_at_program(work)
        if refused:
            self._leave_out("faults of system calls", refused)
        self._tell_left_out()
        verified = snapshot.verified and bool(rows) and all(row.verified for row in rows)
        verified = verified and (program is None or program.verified)
        self._say()
        if verified:
            verdict = f"Verified: the image, and all of its {len(rows)} restored copies."
        else:
            verdict = "NOT VERIFIED: see above."
        self._say(self._paint(verdict, _GREEN if verified else _RED))
        return EXIT_VERIFIED if verified else EXIT_NOT_VERIFIED

    # The steps

    def _restore(self, image: IO[bytes], snapshot: Snapshot) -> list[Restored]:
        self._tell_heading()
        rows: list[Restored] = []
        for memory in MEMORY_TYPES.values():
            pages = snapshot.length // HUGE_PAGE if memory.page_size == HUGE_PAGE else 0
            if pages and (why_not := restoring.why_no_huge_pages(snapshot.length)):
                self._leave_out(LABELS[memory.name], why_not)
                continue
            with huge_pages(pages):
                rows += self._restore_into(memory, image, snapshot)
        return rows

    def _restore_into(
        self, memory: MemoryType, image: IO[bytes], snapshot: Snapshot
    ) -> Iterator[Restored]:
        for driver in DRIVERS:
            try:
                row = restoring.restore(
                    image, snapshot.length, snapshot.expected, memory, driver, self._seed
                )
            except restoring.NotAllowedError as error:
                self._leave_out(f"{LABELS[memory.name]} ({driver})", str(error))
            else:
                self._tell_row(row)
                yield row

    def _look_at_program(self, work: WorkingSet) -> programs.Result | None:
        content = work.content
        if len(content) < PROGRAM_MIN:
            content *= -(-PROGRAM_MIN // len(content))
        try:
            result = programs.run(content[:PROGRAM_MAX])
        except programs.NotAllowedError as error:
            self._leave_out("snapshots and a core of a program that was not prepared", str(error))
            return None
        if result.why:
            self._leave_out("saving that program while it runs", result.why)
        self._tell_program(result)
        return result

    # The output

    def _say(self, text: str = "") -> None:
        lines = textwrap.wrap(
            text,
            WIDTH,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines or [""]:
            print(line, flush=True)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _tell_work(self, work: WorkingSet) -> None:
        self._say()
        unreadable = f" ({work.unreadable} could not be read)" if work.unreadable else ""
        self._say(
            f"Working set {work.files:,} file{'s' * (work.files > 1)}{unreadable},"
            f" {len(work.content) / MIB:.1f} MiB, of"
            f" {work.origin}; in {work.length // MIB} MiB of shared memory of a child process"
        )

    def _tell_snapshot(self, it: Snapshot) -> None:
        self._say(
            f"Instant     after {it.edit:,} edits; the child was paused for"
            f" {it.paused_s * 1e3:.2f} ms, {it.protect_s * 1e3:.2f} of them to write-protect"
            f" {it.length // PAGE:,} pages"
        )
        image_s = it.save_s + it.write_s
        self._say(
            f"Image       {it.length / MIB:.0f} MiB in {image_s:.3f} s ({it.save_s:.3f} to save"
            f" them, {it.write_s:.3f} to write the file), while the child made"
            f" {it.edits_meanwhile:,} more edits"
        )
        if it.faults is not None:
            wp = it.faults.latency["wp"]
            self._say(
                f"Saved       {it.saved_by_faults:,} pages just before the child wrote them"
                f" (resolved in {wp.percentile(50) / 1e3:.1f} us p50,"
                f" {wp.percentile(99) / 1e3:.1f} us p99), {it.saved_behind:,} in the background;"
                f" the child's longest wait was {it.longest_s * 1e3:.2f} ms"
            )
        else:
            self._leave_out("saving while the child runs", it.untracked)
        self._say(
            f"SHA-256     {it.digest[:16]}... of the image;"
            f" {it.expected[:16]}... of the files with the {it.edit:,} edits repeated: "
            + (self._paint("same", _GREEN) if it.verified else self._paint("DIFFERENT", _RED))
        )

    def _tell_heading(self) -> None:
        self._say()
        for heading in HEADINGS:
            print(self._paint(ROW.format(*heading).rstrip(), _BOLD), flush=True)

    def _tell_row(self, row: Restored) -> None:
        line = ROW.format(
            row.memory,
            row.driver,
            f"{row.faults:,}",
            f"{row.latency_ns(50) / 1e3:,.1f}",
            f"{row.latency_ns(99) / 1e3:,.1f}",
            f"{row.prefetched:,}",
            f"{row.bytes_per_s / MIB:,.0f}" if row.bytes_per_s else "-",
            "",
        ).rstrip()
        answer = self._paint("yes", _GREEN) if row.verified else self._paint("NO", _RED)
        print(f"{line}  {answer}", flush=True)

    def _tell_program(self, it: programs.Result) -> None:
        self._say()
        self._say(
            f"Program     process {it.pid}, Python with {it.length / MIB:.1f} MiB of files in its"
            f" own memory, which one of its threads edits constantly; it was not prepared, and made"
            f" {it.edits:,} more edits meanwhile"
        )
        for image in it.images:
            answer = self._paint("same", _GREEN)
            if not image.check.verified:
                answer = self._paint("DIFFERENT", _RED)
            self._say(
                f"{PROGRAM_WORDS[image.what]}{image.bytes / MIB:.1f} MiB by {image.method} in"
                f" {image.seconds:.2f} s; the program was stopped for {image.pause_s * 1e3:.1f} ms,"
                f" after {image.check.edit:,} edits; read back and compared: {answer}"
            )
        if not it.goes_on:
            self._say(self._paint("            the program does NOT continue to work", _RED))

    def _leave_out(self, what: str, why: str) -> None:
        self._left_out.setdefault(why, []).append(what)

    def _tell_left_out(self) -> None:
        for number, (why, what) in enumerate(self._left_out.items()):
            if not number:
                self._say()
            self._say(f"Left out    {'; '.join(what)}: {why}")
