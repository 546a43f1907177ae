"""Demand faults in order, as the engine logged them, without an object for each (layer L4)."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from pyuffd._abi import PagefaultFlag
from pyuffd._arguments import check_int
from pyuffd._describe import counted
from pyuffd._pages import RangeLike, check_region, page_size_of, round_down

_FAULT = struct.Struct("=QQIIQ")  # struct uffd_logged_fault
_WORDS = _FAULT.size // 8


@dataclass(frozen=True, slots=True)
class LoggedFault:
    """One demand fault.

    Attributes:
        address: The faulting address, which the kernel rounds down to the page without
            Feature.EXACT_ADDRESS.
        time_ns: CLOCK_MONOTONIC when it was resolved, in ns.
        flags: Which kind of fault it was.
        thread_id: The faulting thread; 0 without Feature.THREAD_ID.
        space: Whose memory it was: 0 for that of the handler's own userfaultfd; others, and each
            fork, have numbers of their own.
    """

    address: int
    time_ns: int
    flags: PagefaultFlag
    thread_id: int
    space: int


@dataclass(frozen=True, slots=True, repr=False)
class FaultLog(Sequence[LoggedFault]):
    """Demand faults in the order in which they were resolved; made by `Handler.take_faults`.

    It is a sequence of `LoggedFault`, made when they are asked for. For many faults use
    `addresses` or `offsets`.

    Attributes:
        data: The faults, 32 bytes each.
        lost: How many later faults found the log full.
    """

    data: bytes
    lost: int

    def __len__(self) -> int:
        return len(self.data) // _FAULT.size

    @overload
    def __getitem__(self, index: int) -> LoggedFault: ...

    @overload
    def __getitem__(self, index: slice) -> list[LoggedFault]: ...

    def __getitem__(self, index: int | slice) -> LoggedFault | list[LoggedFault]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = check_int("index", index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"fault {index} of {len(self)}")
        address, time_ns, flags, thread_id, space = _FAULT.unpack_from(
            self.data, place * _FAULT.size
        )
        return LoggedFault(address, time_ns, PagefaultFlag(flags), thread_id, space)

    def __iter__(self) -> Iterator[LoggedFault]:
        return (self[index] for index in range(len(self)))

    @property
    def addresses(self) -> memoryview:
        """The addresses in order, as a view of 64-bit numbers."""
        return memoryview(self.data).cast("Q")[::_WORDS]

    @property
    def spaces(self) -> memoryview:
        """The spaces in order, as `LoggedFault.space`, as a view of 64-bit numbers."""
        return memoryview(self.data).cast("Q")[_WORDS - 1 :: _WORDS]

    def offsets(self, region: RangeLike, *, space: int = 0) -> array[int]:
        """Return the offsets of a region's pages in the order of their first faults, each once.

        Args:
            region: The region, at the address where the faults occurred.
            space: As `LoggedFault.space`.
        """
        check_region(region)
        check_int("space", space, 0)
        start, end, page_size = region.start, region.start + region.length, page_size_of(region)
        seen = dict.fromkeys(
            round_down(address - start, page_size)
            for address, its_space in zip(self.addresses, self.spaces, strict=True)
            if start <= address < end and its_space == space
        )
        return array("Q", seen)

    def __repr__(self) -> str:
        lost = f", {self.lost} lost" if self.lost else ""
        return f"<FaultLog of {counted(len(self), 'fault')}{lost}>"
