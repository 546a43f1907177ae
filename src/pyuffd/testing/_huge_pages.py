"""Enlarge the pool of 2 MiB huge pages for a while.

A write to nr_hugepages sets the size of the pool without its surplus pages: those that are still
in use or reserved after the pool was made smaller. Growing the pool first turns surplus pages into
ordinary ones, which frees none of them. So their number is added to the request.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyuffd._machine import POOLS, free_pages
from pyuffd.testing._memory_types import HUGE_PAGE

POOL = Path(POOLS, "hugepages-2048kB")


class Grown(NamedTuple):
    """By how much the pool has grown; both numbers must be given back.

    Attributes:
        added: Free pages that it did not have before.
        counted_in: Surplus pages that became part of it.
    """

    added: int
    counted_in: int


def free_hugepages(size: int = HUGE_PAGE) -> int:
    """Return how many huge pages of this size are neither used nor reserved."""
    return free_pages(size)


def add(count: int) -> Grown:
    """Add free pages to the pool: fewer if memory is short, none if this user may not."""
    with contextlib.suppress(OSError), _locked():
        return _grow(count)
    return Grown(0, 0)


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Make this many huge pages of 2 MiB available inside the `with` block.

    Missing pages are added to the machine's pool, as far as memory and privileges allow, and
    removed afterwards. A mapping that does not get enough pages raises an error.

    Args:
        count: Pages that are neither used nor reserved.

    GIL: released.  Threads: safe; processes that use this, or pyuffd's own tests, take turns.
    Blocks: while the kernel makes room in memory, up to seconds.

    Example:
        >>> from pyuffd.testing import huge_pages
        >>> with huge_pages(0):
        ...     pass
    """
    grown = Grown(0, 0)
    with contextlib.suppress(OSError), _locked():
        grown = _grow(count - free_hugepages())
    try:
        yield
    finally:
        if any(grown):
            give_back(sum(grown))


def give_back(count: int) -> None:
    """Make the pool smaller; pages that are in use or reserved become surplus pages."""
    with contextlib.suppress(OSError), _locked():  # if not allowed, none were added either
        _resize(max(_size() - count, 0))


def _grow(lacking: int) -> Grown:
    if lacking <= 0:
        return Grown(0, 0)
    before, surplus = _size(), _count("surplus_hugepages")
    _resize(before + surplus + lacking)
    grown = _size() - before
    return Grown(max(grown - surplus, 0), min(grown, surplus))


def _size() -> int:
    return _count("nr_hugepages") - _count("surplus_hugepages")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Keep other users of this module from changing the pool between our reads and our write."""
    with (POOL / "nr_hugepages").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _count(name: str) -> int:
    return int((POOL / name).read_text())


def _resize(count: int) -> None:
    (POOL / "nr_hugepages").write_text(str(count))
