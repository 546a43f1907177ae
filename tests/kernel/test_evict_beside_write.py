"""evict() of a memfd beside a write(2) to it, from a buffer that the same handler serves.

The write has the lock of the file while it waits for the handler, and evict() waits for that lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from contextlib import closing
from pathlib import Path

import pytest

from pyuffd import CallableSource, Feature, Handler, Region, Userfaultfd
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._faults import Task
from tests.kernel._serving import content, states
from tests.kernel._verbs import ABSENT, MINOR, MISSING, TRACKING, WP

LIBC = ctypes.CDLL(None, use_errno=True)
EVICTED = 4  # pages
ASKED, TO = 8, 12  # the pages that is missing, and that is written
MADV_DONTNEED = 4
WAITS_S = 5.0
MODES = {
    "missing": MISSING,
    "wp": MISSING | WP,
    "minor": MISSING | MINOR,
    "all": MISSING | MINOR | WP,
}


class Buffer(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def wait_for_lock(task: Task[int]) -> None:
    """Wait until a thread waits for the lock of the file, or has ended."""
    give_up = time.monotonic() + WAITS_S
    while task.running and time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            if "fallocate" in Path(f"/proc/self/task/{task.native_id}/wchan").read_text():
                return
        time.sleep(0.001)


def beside(mode: str, is_mapped: bool, events: bool) -> None:
    """The write begins with a page that is missing, and goes on with one that is evicted."""
    data = content(16 * PAGE)
    evictions: list[Task[int]] = []

    def evict() -> int:
        return handler.evict(region, 0, EVICTED * PAGE, write_back=None)

    def read(offset: int, length: int) -> bytes:
        if offset == ASKED * PAGE:
            evictions.append(
                Task(lambda: handler.evict(region, 0, EVICTED * PAGE, write_back=None))
            )
            wait_for_lock(evictions[0])
        return data[offset : offset + length]

    features = TRACKING | Feature.MINOR_SHMEM | (Feature.EVENT_REMOVE if events else Feature(0))
    with (
        Userfaultfd(features=features) as uffd,
        Region.memfd(16 * PAGE) as region,
        closing(region.alias()) as alias,
        Handler(uffd, driver="thread", workers=2, stall_timeout_s=30) as handler,
    ):
        local = alias if MODES[mode] & MINOR else None
        handler.serve(region, CallableSource(read), mode=MODES[mode], local=local)
        region.touch(0, EVICTED * PAGE)
        if not is_mapped:
            region.madvise(MADV_DONTNEED, 0, EVICTED * PAGE)
        half = PAGE // 2
        parts = (Buffer(region.start + ASKED * PAGE, half), Buffer(region.start + PAGE, half))
        place = ctypes.c_long(TO * PAGE)
        write = Task(LIBC.pwritev, region.fd, (Buffer * 2)(*parts), 2, place)
        assert write.result() == PAGE
        assert evictions[0].result() == EVICTED * PAGE
        assert states(handler, region)[:EVICTED] == [ABSENT] * EVICTED
        assert region.read(0, EVICTED * PAGE) == data[: EVICTED * PAGE]
        written = data[ASKED * PAGE :][:half] + data[PAGE:][:half]
        assert region.read(TO * PAGE, PAGE) == written


@needs(TRACKING | Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
@pytest.mark.parametrize(
    ("is_mapped", "events"),
    [(True, False), (True, True), (False, False)],
    ids=["mapped", "with-events", "in-the-cache"],
)
@pytest.mark.parametrize("mode", MODES)
def test_neither_waits_for_the_other(mode: str, is_mapped: bool, events: bool) -> None:
    run_child(beside, mode, is_mapped, events)
