"""Which lines and branches of the kernel the conformance suite reaches.

A small kernel counts in the files that matter (CONFIG_GCOV_KERNEL), runs the suite, and its counts
become docs/generated/kernel-coverage.md. What is not reached has a reason in unreached.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vm import _debian, _image, _run
from tests.vm._mutants import SERIES, Builder, BuildError

PAGE = _image.ROOT / "docs/generated/kernel-coverage.md"
OUTPUT = _image.ROOT / "build/kernel-coverage"
REASONS = Path(__file__).with_name("unreached.toml")
CONFIG = "CONFIG_GCOV_KERNEL=y\n"
SCALE = 10.0
RUN_S = 600.0
MISSING = "**a case is missing**"

# Whole files, functions of one, and lines of the others that name what it is about.
WHOLE = ("fs/userfaultfd.c", "mm/userfaultfd.c")
SCAN = "fs/proc/task_mmu.c"
_SCAN_FUNCTIONS = re.compile(r"pagemap_scan|pagemap_page_category|pagemap_thp_category|uffd_wp")
OTHERS = tuple(
    f"mm/{name}.c"
    for name in (
        *("memory", "hugetlb", "mprotect", "mremap", "shmem", "huge_memory", "khugepaged"),
        *("swapfile", "rmap", "migrate", "gup", "madvise"),
    )
)
_WORDS = re.compile(r"uffd|userfaultfd|pte_marker")
FILES = (*WHOLE, SCAN, *OTHERS)


@dataclass
class Line:
    """One line of code: how often it ran, and how often each branch of it was taken."""

    number: int
    function: str
    count: int = 0
    branches: list[int] = field(default_factory=list)


@dataclass
class Source:
    """One file: its text and its lines that have code and are of interest."""

    file: str
    text: list[str]
    lines: dict[int, Line]

    def of(self, line: Line) -> str:
        """Return the text of a line."""
        return " ".join(self.text[line.number - 1].split())


@dataclass(frozen=True)
class Count:
    """Lines and branches, reached and in all."""

    lines: int
    all_lines: int
    branches: int
    all_branches: int

    def __str__(self) -> str:
        return f"{_share(self.lines, self.all_lines)} | {_share(self.branches, self.all_branches)}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "-"


def count(lines: Sequence[Line]) -> Count:
    """Count what was reached."""
    branches = [taken for line in lines for taken in line.branches]
    return Count(
        sum(line.count > 0 for line in lines),
        len(lines),
        sum(taken > 0 for taken in branches),
        len(branches),
    )


def build(jobs: int) -> tuple[Path, Path, str]:
    """Return the kernel that counts, its tree, and its release."""
    pristine = _debian.source(SERIES)
    tree = pristine.with_name(f"{pristine.name}.coverage")
    if not (tree / "Makefile").exists():
        shutil.copytree(pristine, tree, symlinks=True)
    builder = Builder(tree, jobs)
    builder.configure(CONFIG)
    _profile(tree)
    print("kernel-coverage: building", flush=True)
    builder.make("bzImage")
    return tree / "arch/x86/boot/bzImage", tree, builder.release


def _profile(tree: Path) -> None:
    """Say which files count. On make's command line, a name would mean every file of that name."""
    for file in FILES:
        makefile = tree / Path(file).parent / "Makefile"
        line = f"GCOV_PROFILE_{Path(file).stem}.o := y\n"
        if line not in (text := makefile.read_text()):
            makefile.write_text(text + line)


def run(kernel: Path, arguments: Sequence[str]) -> str:
    """Run the suite; return what it said last, and leave gcov.tar in the folder.

    Raises:
        BuildError: there are no counts.
    """
    guest = _run.Guest(kernel, OUTPUT, scale=SCALE, run_s=RUN_S, show=_show)
    result = guest.pytest(*_run.redirect([*_run.SUITE, *arguments])[0])
    if not (OUTPUT / "gcov.tar").exists():
        raise BuildError(result.sentence or "the kernel has no counts")
    console = (OUTPUT / "console.log").read_text(errors="replace")
    found = re.findall(r"^\d+ passed, \d+ failed, \d+ skipped", console, re.MULTILINE)
    return found[-1] if found else result.sentence


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def read(tree: Path) -> list[Source]:
    """Bring the counts to where gcov looks for them, and read what it says."""
    with tarfile.open(OUTPUT / "gcov.tar") as archive:
        for member in archive.getmembers():
            name = f"/{member.name}"
            data = archive.extractfile(member)
            if data is not None and name.startswith(f"{tree}/"):
                Path(name).write_bytes(data.read())
    sources = []
    for file in FILES:
        counts = (tree / file).with_suffix(".gcda")
        command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", str(counts)]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
        text = (tree / file).read_text().splitlines()
        found: dict[int, Line] = {}
        for part in json.loads(done.stdout)["files"]:
            if part["file"] == file:
                found = merged(part["lines"])
        lines = {n: line for n, line in found.items() if _is_wanted(file, line, text[n - 1])}
        sources.append(Source(file, text, lines))
    return sources


def merged(entries: Sequence[Mapping[str, Any]]) -> dict[int, Line]:
    """Return each line once: copies of a function, inlined or cloned, count together."""
    lines: dict[int, Line] = {}
    for entry in entries:
        number = entry["line_number"]
        line = lines.setdefault(number, Line(number, entry.get("function_name", "").split(".")[0]))
        line.count += entry["count"]
        taken = [branch["count"] for branch in entry["branches"]]
        if len(taken) > len(line.branches):
            line.branches += [0] * (len(taken) - len(line.branches))
        for at, times in enumerate(taken):
            line.branches[at] += times
    return lines


def _is_wanted(file: str, line: Line, text: str) -> bool:
    if file in WHOLE:
        return True
    if file == SCAN:
        return _SCAN_FUNCTIONS.search(line.function) is not None
    return _WORDS.search(text) is not None


def reasons() -> dict[tuple[str, str, str], str]:
    """Return why a line cannot be reached, by file, function and text."""
    rows = tomllib.loads(REASONS.read_text())["line"]
    return {(row["file"], row["function"], row["text"]): row["why"] for row in rows}


def stale(sources: Sequence[Source]) -> list[tuple[str, str, str]]:
    """Return the lines that have a reason and are reached, or are not there any more."""
    missed = {
        (source.file, line.function, source.of(line))
        for source in sources
        for line in source.lines.values()
        if not line.count
    }
    return sorted(set(reasons()) - missed)


def page(sources: Sequence[Source], release: str, ended: str) -> str:
    """Return docs/generated/kernel-coverage.md."""
    return "\n".join(_lines(sources, release, ended)) + "\n"


def _lines(sources: Sequence[Source], release: str, ended: str) -> Iterator[str]:
    yield "# Which lines of the kernel the conformance suite reaches"
    yield ""
    yield (
        f"Written by `make kernel-coverage`; do not edit. Linux {release}, small configuration, in"
        f" a guest with one CPU: {ended}. Of {' and '.join(WHOLE)} all lines count, of {SCAN} the"
        " functions of PAGEMAP_SCAN, and of the others the lines that name userfaultfd or markers."
        " A branch is one that the compiler made; error checks that user space cannot fail have"
        " some, too."
    )
    yield ""
    yield "| file | lines | branches |"
    yield "|---|---|---|"
    for source in sources:
        yield f"| {source.file} | {count(list(source.lines.values()))} |"
    yield ""
    yield "## By function"
    yield ""
    yield "| file | function | lines | branches |"
    yield "|---|---|---|---|"
    for source in sources:
        by_function: dict[str, list[Line]] = {}
        for line in source.lines.values():
            by_function.setdefault(line.function, []).append(line)
        for function, lines in by_function.items():
            yield f"| {source.file} | `{function}` | {count(lines)} |"
    yield ""
    yield "## Lines that are not reached"
    yield ""
    yield "| file | function | line | why |"
    yield "|---|---|---|---|"
    known = reasons()
    for source in sources:
        for line in source.lines.values():
            if not line.count:
                key = source.file, line.function, source.of(line)
                text = key[2].replace("|", "\\|")
                why = known.get(key, MISSING)
                yield f"| {source.file} | `{line.function}` | `{text}` | {why} |"


def main() -> int:
    """Build, run, write the page."""
    parser = argparse.ArgumentParser(prog="kernel-coverage", description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="make -j")
    parser.add_argument(
        "--again", action="store_true", help="write the page from the last run's counts"
    )
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="more arguments for pytest")
    options = parser.parse_args()
    _run.end_with_us()
    try:
        kernel, tree, release = build(options.jobs)
        ended = OUTPUT / "ended"
        if not options.again:
            said = run(kernel, options.pytest)
            ended.write_text(said)
        sources = read(tree)
    except (BuildError, _debian.KernelNotFoundError, _image.MissingOnHostError) as error:
        print(f"kernel-coverage: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(page(sources, release, ended.read_text()))
    for source in sources:
        print(f"kernel-coverage: {source.file}: {count(list(source.lines.values()))}", flush=True)
    for line in stale(sources):
        print(f"kernel-coverage: {REASONS.name} has a reason without need: {line}", file=sys.stderr)
    return 1 if stale(sources) else 0


if __name__ == "__main__":
    sys.exit(main())
