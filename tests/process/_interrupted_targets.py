"""Scenarios for `_interruptions` with another process, and those of trackers.

However a call is left, the other process continues as before. An exception that arrives just as a
`with` block ends leaves that to the last reference to the object, so each block is in a function
that has returned when this is checked; garbage collection takes the exception's traceback.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyuffd import DirtyTracker, Feature, Process, Region, Snapshot, Userfaultfd
from tests.process._attach import wait_until
from tests.process._interruptions import MARK, Interrupter, Scenario

PAGE = 4096
PAGES = 8


@contextlib.contextmanager
def target() -> Iterator[Process]:
    """Start a process; afterwards check that nobody holds it."""
    with subprocess.Popen(["/bin/sleep", "600"]) as program:
        try:
            wait_until("it sleeps", lambda: _state(program.pid) == ("S", 0))
            with Process(program.pid) as process:
                yield process
            wait_until("it runs", lambda: _state(program.pid) == ("S", 0))
        finally:
            program.kill()


def _state(pid: int) -> tuple[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines)
    return fields["State"][0], int(fields["TracerPid"])


def stop_process(at: Interrupter) -> None:
    def stop() -> None:
        with at.armed(), process.stopped(10) as stop:
            stop.registers()

    with target() as process:
        stop()
        gc.collect()


def attach_to_process(at: Interrupter) -> None:
    with target() as process, at.armed(), process.attach(Feature.WP_ASYNC, timeout_s=10):
        pass


def track_process(at: Interrupter) -> None:
    def collect() -> None:
        with at.armed(), DirtyTracker(process) as tracker:
            tracker.collect().commit()

    with target() as process:
        collect()
        gc.collect()


def save_process(at: Interrupter) -> None:
    """The image is complete, or there is none."""
    path = Path(tempfile.gettempdir(), MARK)
    try:
        with target() as process, at.armed():
            Snapshot.take(process, path, method="cow", max_stall_s=60, durable=False)
        if path.exists():
            Snapshot.open(path).close()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def track(at: Interrupter) -> None:
    with Region.memfd(PAGES * PAGE) as region, at.armed(), DirtyTracker(region) as tracker:
        tracker.collect().commit()


def track_drops(at: Interrupter) -> None:
    """A separate process reads the events; it ends with the tracker."""

    def collect() -> None:
        with at.armed(), DirtyTracker(region, watch_drops=True) as tracker:
            tracker.collect().commit()

    with Region.memfd(PAGES * PAGE) as region:
        collect()
        gc.collect()
        with Userfaultfd() as uffd:
            uffd.register(region)  # nobody else has it registered any more


TARGETS: list[Scenario] = [
    stop_process,
    attach_to_process,
    track_process,
    save_process,
    track,
    track_drops,
]
