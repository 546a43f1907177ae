"""The conformance suite on released kernels, old and new, as one page."""

from __future__ import annotations

import argparse
import fnmatch
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyuffd.conformance import Report
from pyuffd.conformance import Result as CaseResult
from tests.vm import _cases, _debian, _image, _run, _suite

VERSIONS = ("5.10", "6.1", "6.12", "6.18", "7.3")
PAGE = _image.ROOT / "docs/generated/kernel-matrix.md"
OUTPUT = _image.ROOT / "build/kernels"

# Addresses in messages would make the page of every run different.
_ADDRESS = re.compile(r"0x7[0-9a-f]{11}")

SKIPS = "## Why tests were skipped"
WORDS = {"passed": "pass", "failed": "**FAIL**", "skipped": "skip"}


@dataclass(frozen=True)
class Column:
    """The suite on one kernel."""

    version: str
    report: Report | None
    sentence: str
    boot_s: float
    wall_s: float

    @property
    def ok(self) -> bool:
        """Whether there is a report without a failure."""
        return self.report is not None and not self.sentence and not self.failures()

    def failures(self) -> list[CaseResult]:
        """Return the results that are failures."""
        return [one for one in self._results() if one.outcome == "failed"]

    def count(self, outcome: str) -> int:
        """Return the number of results with this outcome."""
        return sum(one.outcome == outcome for one in self._results())

    def of_case(self, case: str) -> list[CaseResult]:
        """Return the results of one case, by memory type."""
        return [one for one in self._results() if one.case == case]

    def _results(self) -> list[CaseResult]:
        return list(self.report.results.values()) if self.report else []


def run(version: str, tests: Sequence[str], until: float = math.inf) -> Column:
    """Run tests on one kernel; those that do not run in time are left out."""
    found = _suite.run(_debian.kernel(version), OUTPUT / version, tests, until)
    return Column(version, found.report, found.sentence, found.boot_s, found.wall_s)


def lacking(version: str, tests: Sequence[str]) -> list[str]:
    """Return those tests whose cases the page lacks for this kernel."""
    from tests.vm import _matrix_rows  # imports this module

    known = _matrix_rows.known(PAGE.read_text(), version)
    return [test for test in tests if _cases.split(test)[0] not in known]


def page(columns: Sequence[Column]) -> str:
    """Return docs/generated/kernel-matrix.md."""
    return "\n".join(_lines(columns)) + "\n"


def _lines(columns: Sequence[Column]) -> Iterator[str]:
    yield "# The conformance suite on released kernels"
    yield ""
    yield (
        "What do released kernels do, case by case? A row that differs between columns is a "
        "behaviour that changed."
    )
    yield ""
    yield (
        "Written by `make kernels`; do not edit. Debian's kernels in QEMU guests without hardware "
        "virtualisation; [Tests on another kernel](../kernels.md) tells how to renew rows; "
        "[the conformance suite](conformance.md) describes the cases."
    )
    yield ""
    yield "| | " + " | ".join(column.version for column in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for label, text in (
        ("release", lambda c: c.report.kernel["release"] if c.report else c.sentence),
        ("feature mask", lambda c: f"{c.report.features:#x}" if c.report else ""),
        ("passed", lambda c: str(c.count("passed"))),
        ("failed", lambda c: str(c.count("failed"))),
        ("skipped", lambda c: str(c.count("skipped"))),
        ("kernel warnings", lambda c: str(len(c.report.messages)) if c.report else ""),
        ("user space up, s", lambda c: f"{c.boot_s:.0f}"),
        ("whole run, s", lambda c: f"{c.wall_s:.0f}"),
    ):
        yield f"| {label} | " + " | ".join(map(text, columns)) + " |"
    yield ""
    yield (
        "A cell is one word where all memory types agree, otherwise the memory types of each "
        "outcome. In brackets: the accepted variant that was seen. A dot: not run."
    )
    rows: dict[str, list[str]] = {}
    for column in columns:
        for one in column.report.results.values() if column.report else ():
            rows.setdefault(one.case, [])
    for case in rows:
        rows[case] = [cell(column.of_case(case)) for column in columns]
    yield from tables([column.version for column in columns], rows)
    yield from _details(columns)


def tables(versions: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the cells of cases, one table for each group."""
    groups: dict[str, list[str]] = {}
    for case in rows:
        groups.setdefault(case.partition(".")[0], []).append(case)
    for group, cases in groups.items():
        yield ""
        yield f"## {group}"
        yield ""
        yield "| case | " + " | ".join(versions) + " |"
        yield "|---|" + "---|" * len(versions)
        yield from (f"| `{case}` | " + " | ".join(rows[case]) + " |" for case in cases)


def cell(results: Sequence[CaseResult]) -> str:
    """Return the cell of one case on one kernel, with all memory types."""
    by_word: dict[str, list[str]] = {}
    for one in results:
        word = WORDS[one.outcome] + (f" ({one.variant})" if one.variant else "")
        by_word.setdefault(word, []).append(one.memory)
    if len(by_word) == 1:
        return next(iter(by_word))
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in by_word.items()) or "."


def _details(columns: Sequence[Column]) -> Iterator[str]:
    yield ""
    yield SKIPS
    yield ""
    yield "In the last run of all cases."
    for column in columns:
        reasons: dict[str, int] = {}
        for one in column.report.results.values() if column.report else ():
            if one.outcome == "skipped":
                reason = _ADDRESS.sub("ADDRESS", one.text)
                reasons[reason] = reasons.get(reason, 0) + 1
        yield ""
        yield f"{column.version}:"
        yield ""
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            yield f"- {count}: {reason}"
        if not reasons:
            yield "- none"
    for column in columns:
        for heading, lines in (
            ("Failures", failures(column)),
            ("Kernel warnings", warnings(column)),
        ):
            if lines:
                yield ""
                yield f"## {heading} on {column.version}"
                yield ""
                yield from (f"- {line}" for line in lines)


def failures(column: Column) -> list[str]:
    """Return what failed, each test with what it saw."""
    return [f"`{one.id}`: {_first_line(one.text)}" for one in column.failures()]


def warnings(column: Column) -> list[str]:
    """Return the kernel's warnings; those that differ only in numbers count as one."""
    tests: dict[str, list[str]] = {}
    for message in column.report.messages if column.report else ():
        text = re.sub(r"\b(0x)?[0-9a-f]*[0-9][0-9a-f]*\b", "N", message.text)
        tests.setdefault(text, []).extend(message.tests)
    return [
        f"`{text}` ({', '.join(f'`{name}`' for name in dict.fromkeys(names))})"
        for text, names in tests.items()
    ]


def _first_line(text: str) -> str:
    return _ADDRESS.sub("ADDRESS", text.strip().partition("\n")[0]).replace("|", "\\|")


def add(paths: Sequence[Path]) -> int:
    """Renew the rows of the cases in these reports; return 0 on success."""
    from tests.vm import _matrix_rows  # imports this module

    try:
        text, said = _matrix_rows.added(PAGE.read_text(), [Report.read(path) for path in paths])
    except (OSError, ValueError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(text)
    for line in said:
        print(f"kernels: {line}")
    return 0


def main() -> int:
    """Run the suite on all kernels, write the page; return 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="kernels", description=__doc__)
    parser.add_argument("--version", action="append", dest="versions", help="this one only")
    parser.add_argument(
        "--select", action="append", metavar="PATTERN", help="tests whose ids match, as for fnmatch"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="limit for a kernel; other rows stay"
    )
    parser.add_argument(
        "--lacking", action="store_true", help="run the cases that the page lacks for a kernel"
    )
    parser.add_argument(
        "--add",
        action="append",
        type=Path,
        metavar="REPORT",
        help="put the cases of a report.json of tests/vm/run into the page, and run nothing",
    )
    options = parser.parse_args()
    if options.add:
        return add(options.add)
    _run.end_with_us()
    wanted = _suite.choose()
    if options.select:
        wanted = [t for t in wanted if any(fnmatch.fnmatch(t, one) for one in options.select)]
    columns = []
    for version in options.versions or VERSIONS:
        tests = lacking(version, wanted) if options.lacking else wanted
        if not tests:
            continue
        try:
            column = run(version, tests, time.monotonic() + options.minutes * 60)
        except (_debian.KernelNotFoundError, _image.MissingOnHostError) as error:
            print(f"kernels: {version}: {error}", file=sys.stderr)
            return 2
        columns.append(column)
        print(
            f"kernels: {version}: {column.count('passed')} passed, {column.count('failed')} failed,"
            f" {column.count('skipped')} skipped, {column.wall_s:.0f} s {column.sentence}",
            flush=True,
        )
    is_whole = not (options.versions or options.select or options.lacking)
    if not is_whole or options.minutes < math.inf:
        add([OUTPUT / column.version / "report.json" for column in columns if column.report])
    else:
        PAGE.write_text(page(columns))
    return 0 if all(column.ok for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
