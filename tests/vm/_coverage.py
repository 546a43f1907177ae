"""Which lines and branches of the kernel the conformance suite reaches.

A small kernel with CONFIG_GCOV_KERNEL for the files that matter runs the suite, and its counts
become docs/generated/kernel-coverage.md. unreached.toml has the reasons for unreached lines.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyuffd.conformance import load
from tests.vm import _cover_guest, _debian, _image, _run, _tree
from tests.vm._mutants import Builder, BuildError

PAGE = _image.ROOT / "docs/generated/kernel-coverage.md"
OUTPUT = _image.ROOT / "build/kernel-coverage"
REASONS = Path(__file__).with_name("unreached.toml")
CONFIG = "CONFIG_GCOV_KERNEL=y\n"
SCALE = 10.0
MINUTES = 120.0
# The time that the guest may need besides the tests: to boot, and to send its counts.
MORE_S = 600.0
MISSING = "**a case is missing**"

# Left out elsewhere, because a kernel that fails them must be rebooted.
NEED_A_GUEST = ("PAGEMAP_SCAN.ok.protects-hugetlb-hole",)

# Files that count entirely, one of which some functions count, and others of which the lines that
# mention userfaultfd count.
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
# One branch of an assertion is taken only by a broken kernel.
_ASSERTION = re.compile(r"\b\w*(BUG|WARN)(_ON)?(_ONCE)?\(|\b\w+_assert_\w+\(|\bassert_\w+\(")
FILES = (*WHOLE, SCAN, *OTHERS)


@dataclass
class Line:
    """One line of code: how often it ran, and how often each branch of it was taken."""

    number: int
    function: str
    count: int = 0
    branches: list[int] = field(default_factory=list)


# Many lines are the same, such as `goto out;`; the lines before tell them apart.
_NEAR = 8
_CONDITIONS = ("if (", "} else if (", "for (", "list_for_each")


@dataclass
class Source:
    """One file: its text, and its lines of code that are of interest."""

    file: str
    text: list[str]
    lines: dict[int, Line]

    def of(self, line: Line) -> str:
        """Return the text of a line, after the condition that guards it, if one is near."""
        text = " ".join(self.text[line.number - 1].split())
        if text.startswith(_CONDITIONS):
            return text
        for before in reversed(self.text[max(line.number - 1 - _NEAR, 0) : line.number - 1]):
            condition = " ".join(before.split())
            if condition.startswith(_CONDITIONS):
                return f"{condition} ... {text}"
            if condition in ("}", "{") or condition.endswith(":"):
                break
        return text


@dataclass(frozen=True)
class Count:
    """Lines and branches: reached, and total."""

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
    tree = _tree.copy(_tree.pristine(), "coverage")
    builder = Builder(tree, jobs)
    builder.configure(CONFIG)
    _profile(tree)
    print("kernel-coverage: building", flush=True)
    builder.make("bzImage")
    return tree / "arch/x86/boot/bzImage", tree, builder.release


def _profile(tree: Path) -> None:
    """Select the files that count. On make's command line a name would select all its namesakes."""
    for file in FILES:
        makefile = tree / Path(file).parent / "Makefile"
        line = f"GCOV_PROFILE_{Path(file).stem}.o := y\n"
        if line not in (text := makefile.read_text()):
            makefile.write_text(text + line)


def chosen(patterns: Sequence[str], *, crossings: bool) -> list[str]:
    """Return the ids that match one of the patterns; all ids if there is no pattern."""
    every = [
        name
        for case in load().values()
        for name in case.ids
        if not case.is_slow or case.name in NEED_A_GUEST
        if crossings or not case.is_crossing
    ]
    if patterns:
        every = [name for name in every if any(fnmatch.fnmatch(name, one) for one in patterns)]
    if not every:
        raise BuildError(f"there is no case {' or '.join(patterns)}")
    return every


def run(kernel: Path, wanted: Sequence[str], minutes: float, counts: Path) -> str:
    """Run tests; return how they ended, and leave the counts in a file.

    Raises:
        BuildError: there are no counts.
    """
    plan = json.dumps({"tests": list(wanted), "seconds": 60 * minutes}).encode()
    guest = _run.Guest(
        kernel,
        OUTPUT / "guest",
        accel=_run.accel(1),
        scale=SCALE,
        counted=True,
        run_s=(60 * minutes + MORE_S) / SCALE,
        files={str(_cover_guest.PLAN): plan},
        show=_show,
    )
    result = guest.run([sys.executable, "-m", "tests.vm._cover_guest"])
    if not (result.folder / "gcov.tar").exists():
        raise BuildError(result.sentence or "the kernel has no counts")
    (result.folder / "gcov.tar").rename(counts)
    console = (result.folder / "console.log").read_text(errors="replace")
    found = re.findall(r"^ended: (.*)$", console, re.MULTILINE)
    return found[-1] if found else "it died"


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def read(tree: Path, runs: Sequence[Path]) -> list[Source]:
    """Put the counts of each run where gcov looks for them, and read its results for all runs."""
    entries: dict[str, list[Mapping[str, Any]]] = {file: [] for file in FILES}
    for counts in runs:
        _unpack(counts, tree)
        for file in FILES:
            entries[file] += _entries(tree, file)
    texts = {file: (tree / file).read_text().splitlines() for file in FILES}
    return [source(file, texts[file], entries[file]) for file in FILES]


def source(file: str, text: list[str], entries: Sequence[Mapping[str, Any]]) -> Source:
    """Return the part of a file that counts: lines of interest, without assertions' branches."""
    lines = {}
    for number, line in merged(entries).items():
        if _is_wanted(file, line, text[number - 1]):
            lines[number] = line
            if _ASSERTION.search(text[number - 1]):
                line.branches.clear()
    return Source(file, text, lines)


def _unpack(counts: Path, tree: Path) -> None:
    with tarfile.open(counts) as archive:
        for member in archive.getmembers():
            name = f"/{member.name}"
            data = archive.extractfile(member)
            if data is not None and name.startswith(f"{tree}/"):
                Path(name).write_bytes(data.read())


def _entries(tree: Path, file: str) -> list[Mapping[str, Any]]:
    counts = (tree / file).with_suffix(".gcda")
    command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", str(counts)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return [
        line
        for part in json.loads(done.stdout)["files"]
        if part["file"] == file
        for line in part["lines"]
    ]


def merged(entries: Sequence[Mapping[str, Any]]) -> dict[int, Line]:
    """Return each line once: inlined and cloned copies of a function count together."""
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
    """Return the reasons why lines cannot be reached, by file, function and text."""
    rows = tomllib.loads(REASONS.read_text())["line"]
    return {(row["file"], row["function"], row["text"]): row["why"] for row in rows}


def reachable(source: Source, known: Mapping[tuple[str, str, str], str]) -> list[Line]:
    """Return the lines without a reason to be missed, and their branches to such lines."""
    lines = list(source.lines.values())
    missed = [
        not line.count and (source.file, line.function, source.of(line)) in known for line in lines
    ]
    kept = []
    for line, is_missed, leads_to_missed in zip(lines, missed, [*missed[1:], False], strict=True):
        if not is_missed:
            branches = [taken for taken in line.branches if taken or not leads_to_missed]
            kept.append(Line(line.number, line.function, line.count, branches))
    return kept


def stale(sources: Sequence[Source]) -> list[tuple[str, str, str]]:
    """Return the lines that have a reason although they are reached or no longer exist."""
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
        "Which lines and branches of the kernel does the suite run? A line that it does not run is"
        " listed with the reason, or is a case that is missing. [Tests on another kernel]"
        "(../kernels.md#which-lines-of-the-kernel-are-reached) tells how to repeat it."
    )
    yield ""
    yield (
        f"Written by `make kernel-coverage`; do not edit. Linux {release}, small configuration, in"
        f" a guest with one CPU: {ended}. Of {' and '.join(WHOLE)} all lines count, of {SCAN} the"
        " functions of PAGEMAP_SCAN, and of the others the lines that name userfaultfd or markers."
        " A branch is one that the compiler made, of conditions that are not assertions (BUG_ON,"
        " WARN_ON and the like); checks of errors that user space cannot cause have some, too."
    )
    yield ""
    yield (
        "Lines with a reason in the last table cannot be reached; the last two columns leave them"
        " out, and the branches that lead to them."
    )
    yield ""
    yield "| file | lines | branches | lines, of those | branches, of those |"
    yield "|---|---|---|---|---|"
    known = reasons()
    for one in sources:
        share = count(reachable(one, known))
        yield f"| {one.file} | {count(list(one.lines.values()))} | {share} |"
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
    for source in sources:
        for line in source.lines.values():
            if not line.count:
                key = source.file, line.function, source.of(line)
                text = key[2].replace("|", "\\|")
                why = known.get(key, MISSING)
                yield f"| {source.file} | `{line.function}` | `{text}` | {why} |"


def _runs() -> list[Path]:
    """Return the counts of the last run and of those added to it, in order."""
    return sorted(OUTPUT.glob("run-*.tar"), key=lambda path: int(path.stem.partition("-")[2]))


def main() -> int:
    """Build, run, write the page."""
    parser = argparse.ArgumentParser(prog="kernel-coverage", description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="make -j")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the run")
    parser.add_argument("--without-crossings", action="store_true", help="leave the tables out")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--add", action="store_true", help="add the counts of this run to the last's")
    how.add_argument("--again", action="store_true", help="write the page again, run nothing")
    parser.add_argument("ids", nargs="*", help="patterns of ids, as UFFDIO_COPY.*; all of them")
    options = parser.parse_args()
    _run.end_with_us()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        kernel, tree, release = build(options.jobs)
        if not options.again:
            wanted = chosen(options.ids, crossings=not options.without_crossings)
            kept = _runs() if options.add else []
            for old in set(_runs()) - set(kept):
                old.unlink()
            counts = OUTPUT / f"run-{len(kept) + 1}.tar"
            said = run(kernel, wanted, options.minutes, counts)
            counts.with_suffix(".txt").write_text(said)
        if not _runs():
            raise BuildError("there are no counts yet")
        sources = read(tree, _runs())
        ended = "; ".join(counts.with_suffix(".txt").read_text() for counts in _runs())
    except (BuildError, _debian.KernelNotFoundError, _image.MissingOnHostError) as error:
        print(f"kernel-coverage: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(page(sources, release, ended))
    for one in sources:
        print(f"kernel-coverage: {one.file}: {count(list(one.lines.values()))}", flush=True)
    for line in stale(sources):
        print(f"kernel-coverage: {REASONS.name} has a reason without need: {line}", file=sys.stderr)
    return 1 if stale(sources) else 0


if __name__ == "__main__":
    sys.exit(main())
