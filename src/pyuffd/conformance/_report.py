"""The report of one run: its data, its text and JSON forms, and the comparison of two."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pyuffd._abi import Feature
from pyuffd.conformance._kmsg import expected
from pyuffd.conformance._types import ANY
from pyuffd.testing._memory_types import MEMORY_TYPES

FORMAT = 1
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
MEMORY = (*MEMORY_TYPES, *ANY)
CELLS = {PASSED: "pass", FAILED: "FAIL", SKIPPED: "skip"}
MOST_TESTS = 3  # of the cases that were running, named with a message
_CELL = 21  # wide enough for "pass" with the longest variant


@dataclass(frozen=True, slots=True)
class Result:
    """How one case ended on one memory type.

    Attributes:
        id: Its id, including the memory type.
        case: The id without the memory type.
        memory: The memory type.
        summary: The behaviour in one line.
        outcome: "passed", "failed" or "skipped".
        text: For a failure, what was seen; for a skip, the reason.
        variant: Which accepted variant was seen, or an empty string.
        duration_s: Wall time.
    """

    id: str
    case: str
    memory: str
    summary: str
    outcome: str
    text: str = ""
    variant: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A kernel warning that appeared during the run.

    Attributes:
        text: The line.
        priority: Its level; 4 is a warning, smaller is worse.
        is_fatal: The kernel reports a bug or corruption in itself: the run fails.
        tests: The cases that were running; empty if it appeared between cases.
    """

    text: str
    priority: int
    is_fatal: bool
    tests: list[str]

    @property
    def when(self) -> str:
        """The cases during which it appeared, the first few of them."""
        if not self.tests:
            return "between cases"
        shown = " and ".join(self.tests[:MOST_TESTS])
        more = len(self.tests) - MOST_TESTS
        return f"while {shown}{f' and {more} more' if more > 0 else ''} ran"


@dataclass(slots=True)
class Report:
    """Everything that one run found.

    Attributes:
        kernel: release, version and machine, from uname(2).
        features: The kernel's feature mask.
        results: The results by id.
        messages: Kernel warnings.
        log_readable: Whether the kernel's log could be read.
        pyuffd_version: The version of pyuffd that ran the suite.
    """

    kernel: dict[str, str]
    features: int
    results: dict[str, Result] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    log_readable: bool = True
    pyuffd_version: str = field(default_factory=lambda: version("pyuffd"))

    @classmethod
    def of_this_kernel(cls, features: int) -> Self:
        """Make an empty report."""
        name = os.uname()
        kernel = {"release": name.release, "version": name.version, "machine": name.machine}
        return cls(kernel, features)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON report.

        Raises:
            ValueError: the file is not a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} is not {FORMAT}")
            results = [Result(**item) for item in data["results"]]
            return cls(
                data["kernel"],
                int(data["features"]["mask"], 16),
                {result.id: result for result in results},
                [Message(**item) for item in data["kernel_messages"]],
                data["kernel_log_readable"],
                data["pyuffd"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a conformance report: {error}") from error

    def to_json(self) -> str:
        """Return the JSON form."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "pyuffd": self.pyuffd_version,
            "kernel": self.kernel,
            "features": {"mask": hex(self.features), "names": self.feature_names()},
            "counts": dict(self.counts()),
            "skips": dict(self.skip_reasons()),
            "kernel_log_readable": self.log_readable,
            "kernel_messages": [asdict(message) for message in self.messages],
            "results": [asdict(result) for result in self.results.values()],
        }
        return json.dumps(data, indent=1) + "\n"

    def feature_names(self) -> list[str]:
        """Return the names of the feature mask's bits."""
        return [bit.name or hex(bit) for bit in Feature(self.features)]

    def counts(self) -> Counter[str]:
        """Return the number of results by outcome."""
        return Counter(result.outcome for result in self.results.values())

    def skip_reasons(self) -> Counter[str]:
        """Return how often each reason for a skip was given."""
        return Counter(result.text for result in self.results.values() if result.outcome == SKIPPED)

    @property
    def fatal(self) -> list[Message]:
        """The messages that report a bug or corruption in the kernel."""
        return [message for message in self.messages if message.is_fatal]

    @property
    def unexpected(self) -> list[Message]:
        """The messages that no test causes on purpose, fatal ones first."""
        found = [one for one in self.messages if one.is_fatal or not expected(one.text)]
        return sorted(found, key=lambda message: not message.is_fatal)

    def expected_messages(self) -> Counter[str]:
        """Return the number of messages that tests cause on purpose, by subject."""
        rest = (message for message in self.messages if not message.is_fatal)
        return Counter(what for message in rest if (what := expected(message.text)))

    def matrix(self) -> dict[str, dict[str, Result]]:
        """Return the results by case and memory type."""
        rows: dict[str, dict[str, Result]] = {}
        for result in self.results.values():
            rows.setdefault(result.case, {})[result.memory] = result
        return rows

    def lines(self) -> Iterator[str]:
        """Yield the report as plain text."""
        rows = self.matrix()
        shown = [name for name in MEMORY if any(name in row for row in rows.values())]
        width = max((len(name) for name in rows), default=0)
        yield " " * width + "  " + "".join(f"{name:{_CELL}}" for name in shown).rstrip()
        for name, row in rows.items():
            cells = "".join(f"{cell_text(row.get(memory)):{_CELL}}" for memory in shown)
            yield f"{name:{width}}  {cells}".rstrip()
        yield ""
        for reason, count in self.skip_reasons().most_common():
            yield f"skipped {count}: {reason}"
        counts = self.counts()
        yield (
            f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped"
            f" on Linux {self.kernel['release']}, feature mask {self.features:#x}"
        )
        if not self.log_readable:
            yield "the kernel's log could not be read (it needs CAP_SYSLOG): a WARN would be missed"
        for message in self.unexpected:
            word = "kernel BROKEN" if message.is_fatal else "the kernel's log, not counted"
            yield f"{word}: {message.text} ({message.when})"
        if folded := self.expected_messages():
            parts = ", ".join(f"{count} about {what}" for what, count in folded.items())
            yield f"kernel messages that the tests cause on purpose: {parts}"


def cell_text(result: Result | None) -> str:
    """Return what a cell of the matrix shows."""
    if result is None:
        return "."
    return CELLS[result.outcome] + (f" ({result.variant})" if result.variant else "")


@dataclass(frozen=True, slots=True)
class Difference:
    """One id whose result differs between two reports."""

    id: str
    before: str
    after: str


def compare(before: Report, after: Report) -> list[Difference]:
    """Return the differences between two reports, by id; `absent` means that one has no result."""
    return [
        Difference(name, old, new)
        for name in sorted({*before.results, *after.results})
        if (old := _summary(before.results, name)) != (new := _summary(after.results, name))
    ]


def _summary(results: Mapping[str, Result], name: str) -> str:
    result = results.get(name)
    return "absent" if result is None else cell_text(result)
