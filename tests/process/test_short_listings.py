"""Listings of threads that are not complete, because a thread ended while the kernel made them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd.testing import needs_privilege
from tests._child import limit_s

pytestmark = needs_privilege("CAP_SYS_PTRACE")
THREADS = 7
TARGET = f"""
import threading, time
for _ in range({THREADS} - 1):
    threading.Thread(target=time.sleep, args=[600], daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""
COMMAND = """
import sys
from pyuffd import Process, _remote_calls
from pyuffd.dirty import _drops
with Process(int(sys.argv[1])) as process:
"""
STOP = """
    with process.stopped(60) as stop:
        print(stop.threads)
"""
LIST = """
    print(len(process.threads()))
"""
# A thread that was not seen may be in anything.
DROPS = """
    found = _drops._threads(process)
    print(len(found))
"""
READS = """
    _, running = _remote_calls.reads(process.pid)
    print(running)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("listings") / "short_listings.so"
    source = Path(__file__).parent / "short_listings.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return str(path)


@pytest.mark.parametrize(
    ("use", "listings", "expected"),
    [(STOP, 2, THREADS), (LIST, 1, THREADS), (DROPS, 2, THREADS), (READS, 1, 1)],
    ids=["stop", "list", "drops", "reads"],
)
def test_a_listing_that_ends_early(use: str, listings: int, expected: int, library: str) -> None:
    with subprocess.Popen([sys.executable, "-c", TARGET], stdout=subprocess.PIPE) as target:
        try:
            assert target.stdout is not None
            assert target.stdout.readline()
            done = subprocess.run(
                [sys.executable, "-c", COMMAND + use, str(target.pid)],
                capture_output=True,
                text=True,
                timeout=limit_s(30),
                env={**os.environ, "LD_PRELOAD": library, "LISTINGS": str(listings)},
            )
        finally:
            target.kill()
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
