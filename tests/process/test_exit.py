"""Programs that end without stopping their handlers: they end, whatever state these are in."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import crowd
from tests._memory import PAGE
from tests.process._scripts import run_program

pytestmark = [needs_kernel_faults(), needs(Feature.SIGBUS)]

MAKE = """
import sys, threading, warnings
warnings.simplefilter("ignore")
from pyuffd import CallableSource, Feature, Handler, Region, Userfaultfd, ZeroSource

def read(offset, length):
    return b"x" * length

def make(driver, start):
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(8192)
    handler = Handler(uffd, driver=driver)
    asks = driver in ("thread", "process")
    handler.serve(region, CallableSource(read) if asks else ZeroSource())
    if start:
        handler.start()
        region.read(0, 1)
    return uffd, region, handler
"""
DRIVERS = ("native", "inline", "thread", "process")
PROGRAMS = {
    "global": "kept = [make(driver, {start}) for driver in {drivers}]",
    # The last traceback keeps the frame, until the interpreter has no threads any more.
    "raised": """
def main():
    kept = [make(driver, {start}) for driver in {drivers}]
    raise LookupError("on purpose")

if __name__ == "__main__":
    main()
""",
    "circle": """
class Holds:
    pass

for driver in {drivers}:
    one = Holds()
    one.itself, one.made = one, make(driver, {start})
del one
""",
}


@pytest.mark.crossing
@pytest.mark.parametrize("start", [False, True], ids=["unstarted", "started"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_ends(program: str, start: bool, tmp_path: object) -> None:
    path = f"{tmp_path}/program.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(MAKE + PROGRAMS[program].format(drivers=DRIVERS, start=start))
    ended = subprocess.run(
        [sys.executable, path], stderr=subprocess.PIPE, text=True, timeout=30 * SCALE * crowd()
    )
    assert ended.returncode == (program == "raised"), ended.stderr


# A daemon thread goes on while the interpreter exits

OUTLIVES = """
import atexit, sys, threading

go, thread = threading.Event(), None

@atexit.register  # before pyuffd is imported, so that it runs after pyuffd's
def after_all_has_stopped():
    go.set()
    thread.join(20)

import ctypes, warnings
warnings.simplefilter("ignore")
from pyuffd import BufferSource, CallableSource, Feature, Handler, Region, Userfaultfd

PAGE = 4096
def read(offset, length):
    return b"x" * length

driver, action = sys.argv[1:]
uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
other, region = Region.anonymous(2 * PAGE), Region.anonymous(4 * PAGE)
handler = Handler(uffd, driver=driver)
asks = driver in ("thread", "process")
for memory in (other, region):
    handler.serve(memory, CallableSource(read) if asks else BufferSource(b"x" * 4 * PAGE))
handler.start()
region.read(0, 1)
if action == "loaded":
    handler.populate(region)

def use():
    go.wait()
    if action == "method":
        try:
            region.read(2 * PAGE, 1)
        except BaseException as error:
            print(type(error).__name__)
        return
    print(hex(region.start), ctypes.string_at(region.start + 2 * PAGE, 1), flush=True)

print(hex(region.start), flush=True)
thread = threading.Thread(target=use, daemon=True)
thread.start()
if action == "own":
    import faulthandler
    faulthandler.enable()
"""


def outlives(tmp_path: Path, driver: str, action: str) -> subprocess.CompletedProcess[str]:
    return run_program(tmp_path, OUTLIVES, arguments=(driver, action))


@pytest.mark.parametrize("action", ["touch", "own"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_thread_that_outlives_the_interpreter(driver: str, action: str, tmp_path: Path) -> None:
    """It dies of SIGBUS, as before, and a line says why; other actions still see the signal."""
    ended = outlives(tmp_path, driver, action)
    assert ended.returncode == -signal.SIGBUS
    start = int(ended.stdout, 16)
    said = [line for line in ended.stderr.splitlines() if line.startswith("pyuffd: SIGBUS")]
    assert len(said) == 1, ended.stderr
    assert f"page {start + 2 * PAGE:#x} (offset 0x2000 of the region {start:#x}-" in said[0]
    assert "Handler was stopped because the interpreter exits" in said[0]
    assert ("Fatal Python error: Bus error" in ended.stderr) == (action == "own")


@pytest.mark.parametrize("action", ["method", "loaded"])
def test_nothing_is_said_of_a_thread_that_does_not_die(action: str, tmp_path: Path) -> None:
    ended = outlives(tmp_path, "native", action)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    assert ("PagePoisonedError" if action == "method" else "b'x'") in ended.stdout
