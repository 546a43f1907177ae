"""A target that begins to fill memory by a userfaultfd of its own while its snapshot is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Process, RunState, Snapshot
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Used
from tests._memory import PAGE
from tests.process._tracking import METHODS, OF_OTHERS

pytestmark = OF_OTHERS
PAGES = 16
TARGET = f"""
import sys
from pyuffd import Region, RegisterMode, Userfaultfd
region = Region.anonymous({PAGES * PAGE})
region.write(0, b"x")
print(region.start, flush=True)
sys.stdin.readline()
uffd = Userfaultfd()
uffd.register(region, mode=RegisterMode.MISSING)
print("registered", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("point", ["begun", "captured"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_that_is_registered_meanwhile(
    method: Used, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its absent pages are not zeros, or may not have been: they are LOST."""
    with subprocess.Popen(
        [sys.executable, "-c", TARGET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        try:
            assert target.stdin is not None
            assert target.stdout is not None
            start = int(target.stdout.readline())

            def register(name: str) -> None:
                if name == point:
                    target.stdin.write("\n")  # type: ignore[union-attr]
                    target.stdin.flush()  # type: ignore[union-attr]
                    assert target.stdout.readline() == "registered\n"  # type: ignore[union-attr]

            monkeypatch.setattr(_capture, "barrier", register)
            with Process(target.pid) as process:
                Snapshot.take(
                    process,
                    tmp_path / "one",
                    method=method,
                    max_stall_s=60,
                    shared="skip",
                    durable=False,
                )
        finally:
            target.kill()
    with Snapshot.open(tmp_path / "one") as snapshot:
        states = [snapshot.state(start + page * PAGE) for page in range(PAGES)]
        reasons = {gap.reason for gap in snapshot.gaps if gap.start == start + PAGE}
    assert states == [RunState.DATA] + [RunState.LOST] * (PAGES - 1)
    assert reasons == {"unfilled"}


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_ends_once_it_was_captured(
    method: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "600"]) as target:

        def end(name: str) -> None:
            if name == "captured":
                target.kill()
                target.wait()

        monkeypatch.setattr(_capture, "barrier", end)
        with Process(target.pid) as process:
            Snapshot.take(process, tmp_path / "one", method=method, max_stall_s=60, durable=False)
    with Snapshot.open(tmp_path / "one") as snapshot:
        snapshot.verify()
