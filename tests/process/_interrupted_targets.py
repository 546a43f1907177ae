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
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pyuffd import (
    DirtyTracker,
    Feature,
    Handler,
    Process,
    Region,
    Restore,
    Snapshot,
    Userfaultfd,
    _vmas,
)
from tests._images import START, data, write
from tests.process._attach import wait_until
from tests.process._interruptions import MARK, Interrupter, Scenario

Mode = Literal["copy", "minor"]
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


def track_by_own_userfaultfd(at: Interrupter) -> None:
    """However it ends, nothing is registered with the userfaultfd afterwards."""

    def collect() -> None:
        with at.armed(), DirtyTracker(uffd, [region]) as tracker:
            tracker.collect().commit()

    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
    with Userfaultfd(features=features) as uffd, Region.memfd(PAGES * PAGE) as region:
        collect()
        gc.collect()
        check_unregistered(uffd, region)


def close_tracker(at: Interrupter) -> None:
    """The second close() does what the first one has left, while the tracker is alive."""
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
    with Userfaultfd(features=features) as uffd, Region.memfd(PAGES * PAGE) as region:
        tracker = DirtyTracker(uffd, [region])
        with at.armed():
            tracker.close()
        tracker.close()
        check_unregistered(uffd, region)


def check_unregistered(uffd: Userfaultfd, region: Region) -> None:
    assert not uffd._registered
    (vma,) = _vmas.overlapping(region.start, region.start + PAGE, details=True)
    assert "uw" not in vma.flags


def restored(at: Interrupter, part: str, mode: Mode) -> None:
    """A handler of the program's own serves the region no longer, and continues.

    With "minor" the restore has a handler of its own.
    """
    content = data(PAGES, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, MARK), [(START, [content])])

        def restore(region: Region, handler: Handler) -> None:
            made: Restore | None = None
            options: dict[str, Any] = {"handler": handler} if mode == "copy" else {}
            with at.armed() if part == "make" else contextlib.nullcontext():
                made = snapshot.restore(
                    [(START, region)], mode=mode, paused=True, threads=1, **options
                )
            if made is not None:
                region.touch(0, PAGE)
                with at.armed() if part == "close" else contextlib.nullcontext():
                    made.close()
                made.close()

        with (
            Snapshot.open(path) as snapshot,
            Userfaultfd(features=Feature.EVENT_REMOVE | Feature.MINOR_SHMEM) as uffd,
            Handler(uffd) as handler,
            Region.anonymous(PAGES * PAGE) as region,
        ):
            restore(region, handler)
            gc.collect()
            assert not uffd._has_registered(region.start, region.start + region.length)
            handler.stats()


TARGETS: list[Scenario] = [
    stop_process,
    attach_to_process,
    track_process,
    save_process,
    track,
    track_drops,
    track_by_own_userfaultfd,
    close_tracker,
]
MODES: tuple[Mode, ...] = ("copy", "minor")
RESTORES: dict[str, Scenario] = {
    f"restore-{mode}-{part}": partial(restored, part=part, mode=mode)
    for mode in MODES
    for part in ("make", "close")
}
