"""tests/vm: cases run one after the other in a guest, some of which end their process."""

from __future__ import annotations

import os
import time

import pytest

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
