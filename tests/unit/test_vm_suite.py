"""tests/vm: what a report has of cases that ran in guests without pytest, some of which died."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pyuffd.conformance import Report, Result
from tests.vm import _cases, _matrix, _run, _suite
from tests.vm._suite_guest import MARK, PLAN

TESTS = ["UFFDIO_API.ok.reply.any", "UFFDIO_COPY.ok.page.anon", "UFFDIO_COPY.ok.page.shmem"]
KERNEL = {"release": "6.12.1", "version": "#1", "machine": "x86_64"}


def _line(**what: Any) -> str:
    return f"\n{MARK}{json.dumps(what)}\n"


def _began() -> str:
    return _line(kind="kernel", kernel=KERNEL, features=0x1FF, log=True)


def _ran(test: str, outcome: str = "passed", *records: tuple[int, int, str, bool]) -> str:
    name, memory = _cases.split(test)
    result = Result(test, name, memory, "What it does", outcome, "why", "usual")
    return _line(kind="result", result=asdict(result), records=records)


class Guests:
    """Each guest says the next of these, and how it ended; what each was asked for is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *consoles: tuple[str, str]) -> None:
        self.asked: list[list[str]] = []
        self._left = list(consoles)
        monkeypatch.setattr(_run.Guest, "run", self._run)

    @property
    def _run(self) -> Any:
        def run(guest: _run.Guest, _: Sequence[str]) -> _run.Result:
            assert guest.is_counted
            self.asked.append(json.loads(guest.files[str(PLAN)])["tests"])
            said, sentence = self._left.pop(0)
            guest.folder.mkdir(exist_ok=True)
            (guest.folder / "console.log").write_text(said)
            return _run.Result(0, sentence, guest.folder, boot_s=3.0, wall_s=10.0)

        return run


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warning = (7, 4, "it is odd", False)
    said = _began() + "".join(_ran(test, "passed", warning) for test in TESTS) + _line(kind="done")
    guests = Guests(monkeypatch, (said, ""))
    found = _suite.run(tmp_path, tmp_path / "out", TESTS)
    assert (found.sentence, found.boot_s, found.wall_s) == ("", 3.0, 10.0)
    assert guests.asked == [TESTS]
    report = Report.read(tmp_path / "out/report.json")
    assert (report.kernel, report.features) == (KERNEL, 0x1FF)
    assert set(report.results) == set(TESTS)
    assert report.results[TESTS[0]].variant == "usual"
    assert [(one.text, sorted(one.tests)) for one in report.messages] == [("it is odd", TESTS)]


def test_a_case_that_ends_the_guest_fails_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It said something of the second, but not all of it.
    first = _began() + _ran(TESTS[0]) + _ran(TESTS[1])[:-20]
    second = _began() + _ran(TESTS[2], "skipped") + _line(kind="done")
    guests = Guests(monkeypatch, (first, "it panicked"), (second, ""))
    found = _suite.run(tmp_path, tmp_path / "out", TESTS)
    assert guests.asked == [TESTS, TESTS[2:]]
    assert (found.sentence, found.wall_s) == ("", 20.0)
    assert found.report is not None
    outcomes = {name: one.outcome for name, one in found.report.results.items()}
    assert outcomes == dict(zip(TESTS, ("passed", "failed", "skipped"), strict=True))
    assert found.report.results[TESTS[1]].text == "the guest ended: it panicked"


def test_a_kernel_that_does_not_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Guests(monkeypatch, ("Kernel panic\n", "it did not boot"))
    found = _suite.run(tmp_path, tmp_path / "out", TESTS)
    assert (found.report, found.sentence) == (None, "it did not boot")
    assert not _matrix.Column("6.12", found.report, found.sentence, 0.0, 0.0).ok


def test_what_has_no_time_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Guests(monkeypatch, (_began() + _ran(TESTS[0]), "ended early"))
    found = _suite.run(tmp_path, tmp_path / "out", TESTS, until=time.monotonic())
    assert found.report is not None
    assert list(found.report.results) == TESTS[:1]
    assert found.sentence == "2 tests had no time"


def test_every_case_but_those_that_are_asked_for_is_chosen() -> None:
    chosen = _suite.choose()
    assert set(TESTS) <= set(chosen)
    assert len(chosen) == len(set(chosen))
    assert not any(name.startswith("kselftest.stress-swapping") for name in chosen)


def test_what_the_page_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    one = Result(TESTS[0], "UFFDIO_API.ok.reply", "any", "", "passed")
    report = Report(KERNEL, 0x1FF, {one.id: one})
    page.write_text(_matrix.page([_matrix.Column("6.12", report, "", 0.0, 0.0)]))
    monkeypatch.setattr(_matrix, "PAGE", page)
    assert _matrix.lacking("6.12", TESTS) == TESTS[1:]
