"""Parts that the tracker says nothing about: what the stop sees of them counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Process, Snapshot
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Method
from tests._memory import PAGE
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
PAGES = 8
# Another userfaultfd holds the memory.
TARGET = """
import mmap, sys
from pyuffd import Feature, RegisterMode, Region, Userfaultfd
uffd = Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP)
region = Region.anonymous(int(sys.argv[1]) * 4096)
region.fill(7)
uffd.register(region, mode=RegisterMode.WP)
print(region.start, flush=True)
for _ in sys.stdin:
    region.madvise(mmap.MADV_DONTNEED, 2 * 4096, 3 * 4096)
    print("dropped", flush=True)
"""


@pytest.mark.parametrize(("method", "point"), [("precopy", "round 0"), ("cow", "armed")])
def test_pages_that_were_dropped_before_the_stop(
    method: Method, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", TARGET, str(PAGES)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        start = int(program.stdout.readline())

        def at(name: str) -> None:
            assert program.stdin is not None
            assert program.stdout is not None
            if name == point:
                program.stdin.write("drop\n")
                program.stdin.flush()
                assert program.stdout.readline() == "dropped\n"

        monkeypatch.setattr(_capture, "barrier", at)
        with Process(program.pid) as process:
            Snapshot.take(process, tmp_path / "one", method=method, max_stall_s=5)
        program.stdin.close()
    with Snapshot.open(tmp_path / "one") as snapshot:
        found = snapshot.read(start, PAGES * PAGE)
    assert found == b"\7" * 2 * PAGE + bytes(3 * PAGE) + b"\7" * 3 * PAGE
