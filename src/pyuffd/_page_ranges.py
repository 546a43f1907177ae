"""What the page table says of ranges of pages, packed as the kernel wrote it (layer L2).

A Python object for a page or a range is made only when it is asked for.
"""

from __future__ import annotations

import builtins
import struct
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from pyuffd import _dirty_calls, lowlevel
from pyuffd._abi import PageBit, PageCategory
from pyuffd._arguments import check_flags, check_int, checked_index
from pyuffd._describe import counted
from pyuffd._pages import PAGE_SIZE, check_aligned

_RANGE = struct.Struct("=QQQ")
_WORDS = 3


class PageRange(NamedTuple):
    """The pages [start, end); `categories` are the ones of `return_mask` that all of them have."""

    start: int
    end: int
    categories: PageCategory

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        return f"PageRange({self.start:#x}, {self.end:#x}, {self.categories!r})"


class PageRanges:
    """Ranges of pages in ascending order, packed as 64-bit (start, end, categories) triples.

    Iterating and indexing make one `PageRange` at a time.  `numpy.asarray(ranges)` is a read-only
    array of shape (len, 3) and dtype uint64 of the same memory.
    """

    __slots__ = ("_view",)

    def __init__(self, packed: memoryview) -> None:
        self._view = packed

    def __len__(self) -> int:
        return len(self._view) // _WORDS

    def __getitem__(self, index: int) -> PageRange:
        index = checked_index("range", index, len(self))
        at = index * _WORDS
        start, end, categories = self._view[at : at + _WORDS]
        return PageRange(start, end, PageCategory(categories))

    def __iter__(self) -> Iterator[PageRange]:
        known: dict[int, PageCategory] = {}
        for start, end, bits in _RANGE.iter_unpack(self._view.cast("B")):
            categories = known.get(bits)
            if categories is None:
                categories = known[bits] = PageCategory(bits)
            yield PageRange(start, end, categories)

    def __eq__(self, other: object) -> bool:
        return self._view == other._view if isinstance(other, PageRanges) else NotImplemented

    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _ranges_from_bytes, (self._view.tobytes(),)

    def __repr__(self) -> str:
        return f"<PageRanges: {counted(len(self), 'range')}, {self.bytes:#x} bytes>"

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]]) -> PageRanges:
        """Return the pages of spans (start, end), which may overlap; their `categories` are 0.

        Raises:
            ValueError: a span that is not of whole pages, or ends before it begins.
        """
        packed: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            check_aligned("start", start, PAGE_SIZE)
            check_aligned("end", end, PAGE_SIZE)
            if end < start:
                raise ValueError(f"span [{start:#x}, {end:#x}) ends before it begins")
            if packed and start <= packed[-1][1]:
                packed[-1] = (packed[-1][0], max(end, packed[-1][1]))
            elif end > start:
                packed.append((start, end))
        words = b"".join(_RANGE.pack(start, end, 0) for start, end in packed)
        return cls(memoryview(words).cast("Q"))

    def __or__(self, other: PageRanges) -> PageRanges:
        """Return the pages that are in either set; `categories` are 0."""
        return PageRanges(_dirty_calls.union(self._view, other._view))

    def __and__(self, other: PageRanges) -> PageRanges:
        """Return the pages that are in both sets; `categories` are 0."""
        return PageRanges(_dirty_calls.intersect(self._view, other._view))

    def __sub__(self, other: PageRanges) -> PageRanges:
        """Return the pages that are not in the other set; `categories` are 0."""
        return PageRanges(_dirty_calls.subtract(self._view, other._view))

    def bytes_in(self, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Return how many bytes of each span are in these ranges.

        Args:
            spans: (start, end) of each, in ascending order and without overlaps; mappings, say.
        """
        words = b"".join(_RANGE.pack(start, end, 0) for start, end in spans)
        return _dirty_calls.bytes_in(self._view, memoryview(words).cast("Q"))

    @property
    def bytes(self) -> int:
        """The sum of their sizes in bytes."""
        return lowlevel.pagemap_bytes(self._view)

    def pages(self, page_size: int = PAGE_SIZE) -> int:
        """Return the number of pages of `page_size` bytes in all of them."""
        return self.bytes // check_int("page_size", page_size, 1)

    def memoryview(self) -> builtins.memoryview:
        """Return the packed triples as a read-only view of 64-bit numbers (format "Q")."""
        return self._view

    def __buffer__(self, flags: int) -> builtins.memoryview:
        """Return rows of three numbers; from Python 3.12 on numpy calls this first."""
        if not len(self):
            raise BufferError("a buffer of no rows cannot have the shape of rows")
        return self._view.cast("B").cast("Q", shape=(len(self), _WORDS))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (len(self), _WORDS),
            "typestr": "<u8",
            "data": self._view,
        }


def _ranges_from_bytes(packed: bytes) -> PageRanges:
    return PageRanges(memoryview(packed).cast("Q"))


class PageEntries:
    """The pagemap entries of a range, packed: one 64-bit number for each 4 KiB.

    A huge page also has one entry for each 4 KiB.  Indexing returns the raw number; `at` returns
    the known bits for an address.  `numpy.asarray(entries)` is a read-only array of shape (len,)
    and dtype uint64 of the same memory.
    """

    __slots__ = ("_start", "_view")

    def __init__(self, start: int, packed: memoryview) -> None:
        self._start = start
        self._view = packed

    @property
    def start(self) -> int:
        """The address of the first entry's page."""
        return self._start

    @property
    def length(self) -> int:
        """The bytes of address space that they describe."""
        return len(self._view) * PAGE_SIZE

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: int) -> int:
        return self._view[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._view)

    def __reduce__(self) -> tuple[Any, ...]:
        return _entries_from_bytes, (self._start, self._view.tobytes())

    def __repr__(self) -> str:
        return f"<PageEntries: {len(self)} from {self._start:#x}>"

    def at(self, address: int) -> PageBit:
        """Return the bits of the page that holds `address`, without its frame number.

        Raises:
            IndexError: the address lies outside the range.
        """
        if not self._start <= check_int("address", address) < self._start + self.length:
            raise IndexError(f"{address:#x} is not in [{self._start:#x}, +{self.length:#x})")
        return PageBit(self._view[(address - self._start) // PAGE_SIZE] & _KNOWN_BITS)

    def count(self, bits: PageBit, *, clear: PageBit = PageBit(0)) -> int:  # noqa: B008
        """Return how many pages have all of `bits` and none of `clear`.

        GIL: released.
        """
        return lowlevel.pagemap_count(self._view, *_condition(bits, clear))

    def where(self, bits: PageBit, *, clear: PageBit = PageBit(0)) -> PageRanges:  # noqa: B008
        """Return the runs of pages that have all of `bits` and none of `clear`.

        Their `categories` are 0, as only PAGEMAP_SCAN has categories.

        GIL: released.
        """
        mask, value = _condition(bits, clear)
        return PageRanges(lowlevel.pagemap_runs(self._view, self._start, mask, value))

    def memoryview(self) -> builtins.memoryview:
        """Return the entries as a read-only view of 64-bit numbers (format "Q")."""
        return self._view

    def __buffer__(self, flags: int) -> builtins.memoryview:
        return self._view

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (len(self),), "typestr": "<u8", "data": self._view}


_KNOWN_BITS = sum(PageBit)


def _condition(bits: int, clear: int) -> tuple[int, int]:
    """Return (mask, value): entry & mask == value if it has all of `bits` and none of `clear`."""
    check_flags("bits", bits, PageBit)
    check_flags("clear", clear, PageBit)
    if bits & clear:
        raise ValueError(f"bits {bits & clear:#x} cannot be both set and clear")
    return int(bits) | int(clear), int(bits)


def _entries_from_bytes(start: int, packed: bytes) -> PageEntries:
    return PageEntries(start, memoryview(packed).cast("Q"))
