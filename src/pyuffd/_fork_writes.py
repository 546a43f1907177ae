"""Warn before a fork whose child can write to shared memory without being seen (layer L2).

Without Feature.EVENT_FORK the child's copy of a registered mapping is not registered, and nothing
is write-protected in its page table. What it writes to shared memory is in the parent's memory too,
but causes no fault and leaves the parent's pages protected (measured on Linux 6.18). Private memory
is safe: the child writes to copies of its own.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from contextlib import suppress
from typing import Protocol

from pyuffd import _vmas
from pyuffd._abi import Feature, RegisterMode
from pyuffd._closing import alive

Ranges = tuple[tuple[int, int], ...]

_CALLER = 2  # os.fork() has no frame: the first is the hook's, the second that of its caller
_NOT_FORKED = "dc"  # in smaps: MADV_DONTFORK
_WARNED = None


class Tracked(Protocol):
    """A `Userfaultfd`, as far as it is needed here."""

    adopted: bool
    features: Feature
    _pid: int

    @property
    def closed(self) -> bool: ...
    def _registered_for(self, mode: RegisterMode) -> list[tuple[int, int]]: ...


# What was harmless at an earlier fork, since reading smaps is slow.
_seen: weakref.WeakKeyDictionary[Tracked, Ranges | None] = weakref.WeakKeyDictionary()


def track(uffd: Tracked) -> None:
    """Look at the ranges of a userfaultfd before each fork: some are registered for WP."""
    if not uffd.adopted and not uffd.features & Feature.EVENT_FORK:
        _seen.setdefault(uffd, ())


def is_of_subprocess(caller: dict[str, object]) -> bool:
    """Return whether subprocess forks (for `preexec_fn`): its child calls execve(2) soon."""
    return caller.get("__name__") == "subprocess"


def _before_fork() -> None:
    if not _seen or is_of_subprocess(sys._getframe(1).f_globals):
        return
    for uffd in alive(_seen):
        found = None
        with suppress(OSError):
            found = _unseen(uffd)
        if found is None:
            continue
        _seen[uffd] = _WARNED
        start, end = found
        warnings.warn(
            f"this process forks while writes to shared memory at [{start:#x}, +{end - start:#x})"
            " are tracked (RegisterMode.WP), and those of the child will not be seen: open the"
            " userfaultfd with Feature.EVENT_FORK, or madvise(MADV_DONTFORK) the memory",
            RuntimeWarning,
            stacklevel=_CALLER,
        )


def _unseen(uffd: Tracked) -> tuple[int, int] | None:
    """Return a range in which the child's writes would go unseen, or None."""
    before = _seen.get(uffd)
    if before is _WARNED or uffd.closed or uffd._pid != os.getpid():
        return None
    ranges = tuple(uffd._registered_for(RegisterMode.WP))
    if not ranges or ranges == before:
        return None
    # Both are in address order.
    later = iter(ranges)
    start, end = next(later)
    for vma in _vmas.overlapping(start, ranges[-1][1], details=True):
        if not vma.shared or "uw" not in vma.flags or _NOT_FORKED in vma.flags:
            continue
        while end <= vma.start:  # the last range ends behind every mapping's start
            start, end = next(later)
        if start < vma.end:
            return max(start, vma.start), min(end, vma.end)
    _seen[uffd] = ranges
    return None


os.register_at_fork(before=_before_fork)
