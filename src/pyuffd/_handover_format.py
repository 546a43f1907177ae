"""The message of a handover: its header, and the ranges in it, checked (layer L4)."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from pyuffd._arguments import shown
from pyuffd._handover_peer import Refusal
from pyuffd._pages import (
    RangeLike,
    check_aligned,
    check_page_size,
    check_range,
    check_region,
    page_size_of,
)

MAGIC = b"pyuffd\x00\x1a"  # not text, so that no line-based protocol sends it
VERSION = 1
HEADER = struct.Struct("<8sHHII")
# start, length, page size, offset, number of the memory's descriptor (0: none), reserved.
RANGE = struct.Struct("<QQQQII")

# The kernel sends at most 253 descriptors with one message (SCM_MAX_FD); one is the userfaultfd.
MAX_MEMORY_FDS = 252
FILE_LIMIT = 1 << 63  # off_t


@dataclass(frozen=True, slots=True)
class HandoverRange:
    """A range of the owner's memory, as its owner describes it.

    Attributes:
        start: First address, in the owner's address space.
        length: Bytes, a multiple of `page_size`.
        page_size: The unit of its faults in bytes.
        offset: Where it begins in `fd` in bytes or, without `fd`, in an image that owner and
            receiver agreed on.
        fd: A descriptor of its memory, owned by the `Handover`, or None.
            `Region.file(fd, length, offset=offset)` maps the same memory in this process.
    """

    start: int
    length: int
    page_size: int
    offset: int = 0
    fd: int | None = None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[int, int, int, int]]:
        """Raise TypeError with a descriptor, whose number has no meaning in another process."""
        if self.fd is not None:
            raise TypeError("a HandoverRange with a descriptor cannot be pickled: use send_uffd()")
        return type(self), (self.start, self.length, self.page_size, self.offset)

    def __repr__(self) -> str:
        memory = "" if self.fd is None else f" fd={self.fd}"
        return (
            f"<HandoverRange [{self.start:#x}, +{self.length:#x}) page_size={self.page_size:#x}"
            f" offset={self.offset:#x}{memory}>"
        )


def described(regions: Iterable[RangeLike], memory: bool) -> tuple[list[HandoverRange], list[int]]:
    """Return the ranges of some regions, and the distinct descriptors of their memory."""
    ranges = []
    if isinstance(regions, (str, type)) or not isinstance(regions, Iterable):
        raise TypeError(f"regions must be several regions, not {shown(regions)}")
    for region in regions:
        check_region(region, "regions")
        fd = getattr(region, "fd", None) if memory else None
        offset = int(getattr(region, "offset", 0))
        ranges.append(HandoverRange(region.start, region.length, page_size_of(region), offset, fd))
    if len(ranges) >= 1 << 32:
        raise ValueError(f"{len(ranges)} ranges do not fit in a message")
    _check_ranges(ranges)
    fds = list(dict.fromkeys(each.fd for each in ranges if each.fd is not None))
    if len(fds) > MAX_MEMORY_FDS:
        raise ValueError(
            f"{len(fds)} memory descriptors; one message can have at most {MAX_MEMORY_FDS}"
        )
    return ranges, fds


def parsed(body: bytes, memory_fds: Sequence[int]) -> tuple[HandoverRange, ...]:
    """Return the ranges of a message's body, checked."""
    ranges = []
    unused = set(memory_fds)
    for start, length, page_size, offset, which, reserved in RANGE.iter_unpack(body):
        if reserved:
            raise Refusal("format", f"reserved bits {reserved:#x} are set")
        if which > len(memory_fds):
            raise Refusal("descriptors", f"a range names descriptor {which} of {len(memory_fds)}")
        fd = memory_fds[which - 1] if which else None
        unused.discard(-1 if fd is None else fd)
        ranges.append(HandoverRange(start, length, page_size, offset, fd))
    if unused:
        raise Refusal("descriptors", f"no range uses {len(unused)} of the descriptors")
    try:
        _check_ranges(ranges)
    except ValueError as error:
        raise Refusal("ranges", str(error)) from error
    for each in ranges:
        if each.fd is not None:
            _check_memory(each, each.fd)
    return tuple(ranges)


def _check_ranges(ranges: Sequence[HandoverRange]) -> None:
    """Raise ValueError unless the ranges are possible and disjoint."""
    for each in ranges:
        check_range(each.start, each.length, check_page_size(each.page_size))
        check_aligned("offset", each.offset, 1 if each.fd is None else each.page_size)
        if each.offset + each.length > FILE_LIMIT:
            raise ValueError(f"offset {each.offset:#x} + {each.length:#x} is beyond any file")
    ordered = sorted(ranges, key=lambda each: each.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.length > after.start:
            raise ValueError(f"{before!r} and {after!r} overlap")


def _check_memory(each: HandoverRange, fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Refusal("memory", f"the descriptor of {each!r} is not memory")
    if each.offset + each.length > status.st_size:
        raise Refusal("memory", f"{each!r} ends after its memory of {status.st_size:#x} bytes")
