"""`Share`: one memfd with a snapshot's content, whose clean pages all restores share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakSet

from pyuffd._latch import RLock
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd.regions import Region, RegionKind
from pyuffd.snapshot._content import Placed
from pyuffd.snapshot._restore_map import Mapped


@dataclass(frozen=True, eq=False, slots=True)
class PrivateMapping:
    """A private mapping of a memfd where a region was, as `Handler.serve` gets it."""

    start: int
    length: int
    page_size: int = PAGE_SIZE
    shared: bool = False


class Share:
    """One part of a snapshot's memory in a memfd; filled by restores, then sealed.

    Attributes:
        region: Where this process writes to it, until it is complete.
        is_complete: Whether it has everything.
    """

    def __init__(self, length: int) -> None:
        self.region = Region.memfd(length, noreserve=True)
        self.is_complete = False
        self._users = WeakSet[Placed]()
        self._sealed: Descriptor | None = None
        self._is_sealed = False
        self._lock = RLock()
        self._forgotten = False

    def use(self, placed: Placed) -> Mapped:
        """Note that a restore uses it; return what to map where its region is."""
        region = placed.region
        with self._lock:
            self._users.add(placed)
            fd = self.region.fd if self._sealed is None else self._sealed.number
        assert fd is not None
        return Mapped(region.start, region.start + region.length, fd, 0)

    def complete(self) -> None:
        """Note that everything is in it."""
        self.is_complete = True

    def give_back(self, placed: Placed) -> None:
        """Note that a restore no longer writes to it; the last one seals it.

        May be called again.
        """
        with self._lock:
            self._users.discard(placed)
            if self._users:
                return
            if self._forgotten:
                self._close()
            elif self.is_complete and not self._is_sealed:
                self._seal()

    def _seal(self) -> None:
        """Nothing is written to it any more: the kernel refuses it from now on."""
        if self._sealed is None:
            with Descriptor.open(f"/proc/self/fd/{self.region.fd}", os.O_RDWR) as kept:
                self._sealed = kept.moved()
        self.region.close()
        with suppress(OSError):  # EPERM: it was sealed against more seals
            fcntl.fcntl(self._sealed.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        self._is_sealed = True
        if self._forgotten:  # by a signal handler
            self._close()

    def forget(self) -> None:
        """Close it when no restore fills it."""
        with self._lock:
            self._forgotten = True
            if not self._users:
                self._close()

    def _close(self) -> None:
        self.region.close()
        if self._sealed is not None:
            self._sealed.close()


class Shares:
    """The shares of a snapshot, by the memory that they have."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Share] = {}
        self._lock = RLock()

    @staticmethod
    def check(placed: Sequence[Placed], *, poisons: bool) -> None:
        """Raise ValueError if these cannot be mapped from a memfd."""
        for each in placed:
            if each.gaps and poisons:
                raise ValueError("gaps='poison' needs mode='copy': the pages of a memfd are shared")
            region = each.region
            if (
                not isinstance(region, Region)
                or region.kind is not RegionKind.ANONYMOUS
                or region.page_size != PAGE_SIZE
            ):
                raise ValueError(
                    f"mode='minor': {region!r} is not a Region of private anonymous memory with"
                    " small pages, which a mapping of the memfd can replace"
                )

    def of(self, placed: Placed) -> Share:
        """Return the share that has the content of a region, or a new one."""
        key = (placed.start, placed.region.length)
        with self._lock:
            if key not in self._known:
                self._known[key] = Share(placed.region.length)
            return self._known[key]

    def close(self) -> None:
        """Close them; those that restores are filling are closed afterwards."""
        with self._lock:
            for share in self._known.values():
                share.forget()
            self._known.clear()
