"""The engine's named points (csrc/engine/barrier.h), where a test can stop one of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from pyuffd._shim import lib

WAIT_NS = 10_000_000_000  # reached only if there is a bug: the thread is on its way


class Point(IntEnum):
    """A point where the first thread that arrives stops; engine/barrier.h describes each."""

    STEP_READ = lib.UFFD_BARRIER_STEP_READ
    STEP_APPLIED = lib.UFFD_BARRIER_STEP_APPLIED
    FAULT_CLAIMED = lib.UFFD_BARRIER_FAULT_CLAIMED
    FAULT_WOKEN = lib.UFFD_BARRIER_FAULT_WOKEN
    FILL_CLAIMED = lib.UFFD_BARRIER_FILL_CLAIMED
    PLACED = lib.UFFD_BARRIER_PLACED
    REQUEST_TAKEN = lib.UFFD_BARRIER_REQUEST_TAKEN
    COMPLETE = lib.UFFD_BARRIER_COMPLETE
    UNSERVE_SEALED = lib.UFFD_BARRIER_UNSERVE_SEALED
    LIFTED = lib.UFFD_BARRIER_LIFTED
    EVICT_PLACED = lib.UFFD_BARRIER_EVICT_PLACED
    EVICT_CLAIMED = lib.UFFD_BARRIER_EVICT_CLAIMED
    EVICT_DROPPED = lib.UFFD_BARRIER_EVICT_DROPPED
    REGISTERED = lib.UFFD_BARRIER_REGISTERED


class Held:
    """An armed point."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def wait(self) -> None:
        """Wait until a thread is at the point; it stays there."""
        code = lib.uffd_barrier_wait(self.point, WAIT_NS)
        assert code == 0, f"no thread came to {self.point.name}: {code}"

    def release(self) -> None:
        """Let this thread continue, and all later ones."""
        lib.uffd_barrier_release(self.point)


@contextmanager
def holding(point: Point) -> Iterator[Held]:
    """Stop the next thread that reaches a point, until it is released or the block ends."""
    code = lib.uffd_barrier_arm(point)
    assert code == 0, f"{point.name} cannot be armed: {code}"
    held = Held(point)
    try:
        yield held
    finally:
        held.release()
