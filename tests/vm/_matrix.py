"""The conformance suite on released kernels, old and new, as one page."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyuffd.conformance import Report
from pyuffd.conformance import Result as CaseResult
from tests.vm import _debian, _image, _run

VERSIONS = ("5.10", "6.1", "6.12", "6.18", "7.3")
PAGE = _image.ROOT / "docs/generated/kernel-matrix.md"
OUTPUT = _image.ROOT / "build/kernels"

# A distribution's kernel under emulation.
RUN_S = 120.0

# An address in a message would make every run's page different.
_ADDRESS = re.compile(r"0x7[0-9a-f]{11}")

_WORDS = {"passed": "pass", "failed": "**FAIL**", "skipped": "skip"}


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
        """Return how many results there are of one outcome."""
        return sum(one.outcome == outcome for one in self._results())

    def of_case(self, case: str) -> list[CaseResult]:
        """Return the results of one case, by memory type."""
        return [one for one in self._results() if one.case == case]

    def _results(self) -> list[CaseResult]:
        return list(self.report.results.values()) if self.report else []


def run(version: str, arguments: Sequence[str]) -> Column:
    """Boot one kernel and run the suite."""
    accel = _run.accel(1)
    guest = _run.Guest(
        _debian.kernel(version),
        OUTPUT / version,
        accel=accel,
        scale=_run.scale(accel),
        run_s=RUN_S,
    )
    result = guest.pytest(*_run.redirect([*_run.SUITE, *arguments])[0])
    try:
        report = Report.read(result.folder / "report.json")
    except OSError:
        report = None
    sentence = result.sentence or ("" if report else "there is no report")
    return Column(version, report, sentence, result.boot_s, result.wall_s)


def page(columns: Sequence[Column]) -> str:
    """Return docs/generated/kernel-matrix.md."""
    return "\n".join(_lines(columns)) + "\n"


def _lines(columns: Sequence[Column]) -> Iterator[str]:
    yield "# The conformance suite on released kernels"
    yield ""
    yield (
        "Written by `make kernels`; do not edit. Debian's kernels in QEMU guests without hardware "
        "virtualisation; `tests/vm/run 6.12` repeats one. docs/generated/conformance.md describes "
        "the cases."
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
    cases = dict.fromkeys(
        one.case for column in columns if column.report for one in column.report.results.values()
    )
    group = ""
    for case in cases:
        if case.partition(".")[0] != group:
            group = case.partition(".")[0]
            yield ""
            yield f"## {group}"
            yield ""
            yield "| case | " + " | ".join(column.version for column in columns) + " |"
            yield "|---|" + "---|" * len(columns)
        cells = (cell(column.of_case(case)) for column in columns)
        yield f"| `{case}` | " + " | ".join(cells) + " |"
    yield from _details(columns)


def cell(results: Sequence[CaseResult]) -> str:
    """Return what one kernel did in one case, on every memory type."""
    by_word: dict[str, list[str]] = {}
    for one in results:
        word = _WORDS[one.outcome] + (f" ({one.variant})" if one.variant else "")
        by_word.setdefault(word, []).append(one.memory)
    if len(by_word) == 1:
        return next(iter(by_word))
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in by_word.items()) or "."


def _details(columns: Sequence[Column]) -> Iterator[str]:
    yield ""
    yield "## Why tests were skipped"
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
            ("Failures", [f"`{one.id}`: {_first_line(one.text)}" for one in column.failures()]),
            ("Kernel warnings", _warnings(column)),
        ):
            if lines:
                yield ""
                yield f"## {heading} on {column.version}"
                yield ""
                yield from (f"- {line}" for line in lines)


def _warnings(column: Column) -> list[str]:
    """Return the kernel's warnings, those that differ in numbers only as one."""
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


def main() -> int:
    """Run all kernels, write the page; 0 if nothing failed on any."""
    parser = argparse.ArgumentParser(
        prog="kernels",
        description=__doc__,
        allow_abbrev=False,
        epilog="Whatever else is given goes to pytest.",
    )
    parser.add_argument("--version", action="append", dest="versions", help="this one only")
    options, pytest = parser.parse_known_args()
    _run.end_with_us()
    columns = []
    for version in options.versions or VERSIONS:
        try:
            column = run(version, pytest)
        except (_debian.KernelNotFoundError, _image.MissingOnHostError) as error:
            print(f"kernels: {version}: {error}", file=sys.stderr)
            return 2
        columns.append(column)
        print(
            f"kernels: {version}: {column.count('passed')} passed, {column.count('failed')} failed,"
            f" {column.count('skipped')} skipped, {column.wall_s:.0f} s {column.sentence}",
            flush=True,
        )
    if not options.versions and not pytest:
        PAGE.write_text(page(columns))
    return 0 if all(column.ok for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
