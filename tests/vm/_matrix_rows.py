"""Put runs of some cases into docs/generated/kernel-matrix.md, which has all cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pyuffd.conformance import Report, load
from tests.vm import _matrix

_ROW = re.compile(r"\| `([^`]+)` \| (.*) \|")
_FAILURE = re.compile(r"- `([^`]+)\.[^.`]+`: ")
_OUTCOMES = {word: outcome for outcome, word in _matrix.WORDS.items()}


@dataclass
class _Page:
    """The parts of the page: the text above the tables, their rows, the text below."""

    versions: list[str]
    releases: list[str]
    head: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)
    skips: list[str] = field(default_factory=list)
    below: dict[str, list[str]] = field(default_factory=dict)


def added(text: str, reports: Sequence[Report]) -> tuple[str, list[str]]:
    """Return the page with the rows of these reports, and a sentence about each report.

    A case counts if the report has it on all of its memory types. Cases that no longer exist are
    removed from the page. The reasons of skips are those of complete runs, and do not change.

    Raises:
        ValueError: a report is not of a release that the page has.
    """
    page = _read(text)
    said = []
    for report in reports:
        release = report.kernel["release"]
        if release not in page.releases:
            raise ValueError(f"{release} is none of the page's: {', '.join(page.releases)}")
        number = page.releases.index(release)
        of = len(report.matrix())
        said.append(f"{page.versions[number]}: {len(_take(page, number, report))} of {of} cases")
    return "\n".join(_lines(page)) + "\n", said


def known(text: str, version: str) -> set[str]:
    """Return the cases that have a result for a kernel."""
    page = _read(text)
    number = page.versions.index(version)
    return {name for name, cells in page.rows.items() if cells[number] != "."}


def counts(case: str, cell: str) -> Counter[str]:
    """Return the number of results in a cell, by outcome."""
    found = Counter[str]()
    for part in cell.split("; ") if cell != "." else ():
        word, colon, names = part.partition(": ")
        outcome = _OUTCOMES[word.partition(" (")[0]]
        found[outcome] += len(names.split(", ")) if colon else len(load()[case].memory)
    return found


def _read(text: str) -> _Page:
    lines = text.splitlines()
    tables = next(at for at, line in enumerate(lines) if line.startswith("## "))
    skips = lines.index(_matrix.SKIPS)
    head = _stripped(lines[:tables])
    page = _Page(_cells(head, ""), _cells(head, "release"), head)
    for line in lines[tables:skips]:
        if (row := _ROW.fullmatch(line)) and row[1] in load():
            page.rows[row[1]] = row[2].split(" | ")
    part = page.skips
    for line in lines[skips:]:
        if line.startswith("## ") and line != _matrix.SKIPS:
            part = page.below.setdefault(line, [])
        elif part is page.skips or line:
            part.append(line)
    return page


def _cells(head: Sequence[str], label: str) -> list[str]:
    start = f"| {label} | " if label else "| | "
    line = next(line for line in head if line.startswith(start))
    return line.removeprefix(start).removesuffix(" |").split(" | ")


def _take(page: _Page, number: int, report: Report) -> list[str]:
    """Put a report into a column; return its cases."""
    complete = {
        name: list(by_memory.values())
        for name, by_memory in report.matrix().items()
        if name in load() and set(by_memory) == set(load()[name].memory)
    }
    report.results = {one.id: one for results in complete.values() for one in results}
    for name, results in complete.items():
        cells = page.rows.setdefault(name, ["."] * len(page.versions))
        cells[number] = _matrix.cell(results)
    column = _matrix.Column(page.versions[number], report, "", 0.0, 0.0)
    heading = f"## Failures on {column.version}"
    older = [
        line
        for line in page.below.get(heading, ())
        if (found := _FAILURE.match(line)) is None or found[1] not in complete
    ]
    newer = _bullets(_matrix.failures(column))
    page.below[heading] = older + newer
    heading = f"## Kernel warnings on {column.version}"
    older = page.below.get(heading, [])
    known = {_warning(line) for line in older}
    newer = [line for line in _bullets(_matrix.warnings(column)) if _warning(line) not in known]
    page.below[heading] = older + newer
    return list(complete)


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _warning(line: str) -> str:
    return line.partition("` (")[0]


def _lines(page: _Page) -> Iterator[str]:
    rows = {name: page.rows[name] for name in load() if name in page.rows}
    sums = [Counter[str]() for _ in page.versions]
    for name, cells in rows.items():
        for one, cell in zip(sums, cells, strict=True):
            one.update(counts(name, cell))
    for line in page.head:
        label = line.removeprefix("| ").partition(" |")[0]
        if label in _matrix.WORDS:
            yield f"| {label} | " + " | ".join(str(one[label]) for one in sums) + " |"
        else:
            yield line
    yield from _matrix.tables(page.versions, rows)
    yield ""
    yield from _stripped(page.skips)
    for version in page.versions:
        for what in ("Failures", "Kernel warnings"):
            heading = f"## {what} on {version}"
            if page.below.get(heading):
                yield ""
                yield heading
                yield ""
                yield from page.below[heading]


def _stripped(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).strip("\n").split("\n")
