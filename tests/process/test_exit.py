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
from tests._child import limit_s
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
        [sys.executable, path], stderr=subprocess.PIPE, text=True, timeout=limit_s(30)
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


# Daemon threads end where they need the GIL, perhaps with a lock

LOCKED = """
import atexit, gc, sys, threading, time

LOCKS = type(threading.RLock()), type(threading.Lock())
go, holding = threading.Event(), threading.Event()

def locks():
    for one in gc.get_objects():
        if type(one).__module__.startswith("pyuffd.") and type(one).__name__ != "Latch":
            for name, value in list(getattr(one, "__dict__", {}).items()):
                if isinstance(value, LOCKS):
                    yield f"{type(one).__name__}.{name}", value
    for module in [one for name, one in sys.modules.items() if name.startswith("pyuffd.")]:
        for name, value in list(vars(module).items()):
            if type(value).__name__ == "ForkLock":
                yield f"{module.__name__}.{name}", value.now

def hold():
    go.wait()
    print(*sorted(name for name, lock in locks() if lock.acquire(blocking=False)), flush=True)
    holding.set()
    time.sleep(1e6)

threading.Thread(target=hold, daemon=True).start()

@atexit.register  # before pyuffd is imported, so that it runs after pyuffd's
def after_all_has_stopped():
    go.set()
    holding.wait()

import warnings
warnings.simplefilter("ignore")
from pyuffd import (
    CallableSource, DirtyTracker, Feature, Handler, HandlerError, Region, Snapshot, Userfaultfd,
    ZeroSource, lazy,
)

def make(driver, source):
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(8192)
    handler = Handler(uffd, driver=driver)
    handler.serve(region, source)
    handler.start()
    return uffd, region, handler
"""
HELD: dict[str, tuple[str, str]] = {
    **{
        driver: (f"kept = make({driver!r}, ZeroSource())", "Handler._lock")
        for driver in ("native", "inline", "thread", "process")
    },
    "left-behind": (
        """
inside = threading.Event()
def read(offset, length):
    inside.set()
    time.sleep(1e6)

uffd, region, handler = make("thread", CallableSource(read))
threading.Thread(target=lambda: region.read(0, 1), daemon=True).start()
inside.wait()
try:
    handler.stop(timeout_s=0.1)
except HandlerError:
    pass
engines = [one for one in gc.get_objects() if type(one).__name__ == "EngineLife"]
assert engines
class Drops:
    def __del__(self, one=engines.pop()):
        one.free_if_deserted()
sys.drops = Drops()  # `sys` is cleared last; the threads' frames keep our own names
""",
        "EngineLife._lock",
    ),
    "lazy": ("kept = lazy(b'x' * 8192, 8192).__enter__()", "Handler._lock"),
    "tracker": (
        "kept = DirtyTracker(Region.anonymous(8192)).collect().__enter__()",
        "DirtyTracker._lock",
    ),
    "restore": (
        """
import os, tempfile
memory = Region.anonymous(1 << 22)
memory.write(0, os.urandom(1 << 22))
path = tempfile.mkdtemp(dir=".") + "/image"
Snapshot.take(memory, path)
opened = Snapshot.open(path)
where = opened.regions[0].start
kept = opened.restore({where: Region.anonymous(1 << 22)}, mode="copy", rate=4096)
""",
        "Drain._lock",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_lock_that_nobody_releases(name: str, tmp_path: Path) -> None:
    """Destructors that run at the end do not wait for it."""
    made, lock = HELD[name]
    ended = run_program(tmp_path, LOCKED + made)
    assert ended.returncode == 0, ended.stderr
    assert lock in ended.stdout.split(), ended.stdout
