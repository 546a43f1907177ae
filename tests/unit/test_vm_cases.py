"""tests/vm: cases run one after the other in a guest, some of which end their process."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace

import pytest

from pyuffd._abi import Feature
from pyuffd.conformance import Result, load
from pyuffd.conformance._case import Case
from pyuffd.conformance._context import Context, Mismatch
from pyuffd.testing._need import Lack
from tests.vm import _cases

TESTS = [f"a.{name}.anon" for name in ("passes", "fails", "exits", "skips", "sleeps", "passes")]


def _run(case: str, _memory: str) -> str:
    if case == "a.exits":
        os._exit(3)
    if case == "a.sleeps":
        time.sleep(60)
    return {"a.fails": "it is wrong", "a.skips": _cases.SKIPPED}.get(case, _cases.PASSED)


# In the guest there is one thread; xdist has others.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [_cases.split(test)[0] for test in TESTS]
    monkeypatch.setattr(_cases, "load", lambda: dict(zip(names, names, strict=True)))
    monkeypatch.setattr(_cases, "run", _run)
    monkeypatch.setattr(_cases, "_limit_s", lambda *_: 0.5)


@pytest.mark.usefixtures("_fake")
def test_each_has_an_outcome_whatever_the_others_do() -> None:
    stalled = _cases.STALLED
    wanted = ["", "it is wrong", stalled, _cases.SKIPPED, stalled, ""]
    assert list(_cases.outcomes(TESTS)) == list(zip(TESTS, wanted, strict=True))


def test_a_report_has_all_of_what_each_did(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = [f"UFFDIO_API.ok.reply.any{more}" for more in ("", "2", "3")]
    case = load()["UFFDIO_API.ok.reply"]
    monkeypatch.setattr(_cases, "load", lambda: dict.fromkeys(["UFFDIO_API.ok.reply"], case))
    monkeypatch.setattr(_cases, "_limit_s", lambda *_: 0.5)

    def result(_: Case, memory: str) -> Result:
        if memory == "any2":
            os._exit(3)
        return Result("a", "b", memory, "does c", "failed", f"saw{'x' * 9000}\nmore", "d", 0.5)

    monkeypatch.setattr(_cases, "result", result)
    found = dict(_cases.results(tests))
    assert list(found) == tests
    assert asdict(found[tests[0]]) == asdict(result(case, "any"))
    assert (found[tests[1]].outcome, found[tests[1]].id) == ("failed", tests[1])
    assert found[tests[1]].text.startswith("stalled: ")
    assert found[tests[2]].memory == "any3"


def test_what_a_case_says_of_itself() -> None:
    case = load()["UFFDIO_API.ok.reply"]

    def found(error: BaseException) -> Result:
        def run(_: Context) -> None:
            raise error

        return _cases.result(replace(case, run=run, features=Feature(0)), "any")

    assert found(Lack([], "needs more")).outcome == "skipped"
    assert found(Lack([], "needs more")).text == "needs more"
    failed = found(Mismatch("saw 1, expected 2"))
    assert (failed.outcome, failed.id) == ("failed", "UFFDIO_API.ok.reply.any")
    assert failed.text.startswith("saw 1, expected 2\nfeature mask ")
    assert found(ValueError("")).text == "ValueError"


@pytest.mark.usefixtures("_fake")
def test_the_switch_is_off_between_tests_and_in_the_end() -> None:
    seen: list[bool] = []
    reading, writing = os.pipe()

    def switch(is_on: bool) -> None:
        seen.append(is_on)
        os.write(writing, b"+" if is_on else b"-")

    found = _cases.outcomes(TESTS[:2], switch)
    assert next(found) == (TESTS[0], "")
    found.close()
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        written = file.read()
    assert written.startswith(b"+-")
    assert written.endswith(b"-")
    assert seen == [False, False]  # in this process; the child has its own
