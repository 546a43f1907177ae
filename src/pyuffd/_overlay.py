"""`OverlaySource`: content put together from several page sources (layer L4)."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pyuffd._arguments import check_int, check_part, checked_index, shown
from pyuffd._describe import repr_of
from pyuffd._pages import PAGE_SIZE, round_down, round_up
from pyuffd._source_like import as_source
from pyuffd.sources import BufferSource, FileSource, PageSource, Promised, ZeroSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd._source_like import SourceLike

Gaps = Literal["refuse", "zeros"]
GAPS = ("refuse", "zeros")
_PACKED = struct.Struct("=3Q")
LARGEST = 1 << 63  # of offsets in files
IN_C = (FileSource, BufferSource, ZeroSource)  # sources that the engine reads without Python


class Run(NamedTuple):
    """Bytes [start, end) of an overlay, from `offset` on in the leaf of this number."""

    start: int
    end: int
    leaf: int
    offset: int

    def cut(self, start: int, end: int) -> Run:
        """Return the part of it in [start, end), which meet."""
        first = max(start, self.start)
        return Run(first, min(end, self.end), self.leaf, self.offset + first - self.start)


class PackedRuns(Sequence[Run]):
    """Runs as C has them: (start, leaf, offset), 64-bit numbers each; the last ends at `length`."""

    def __init__(self, words: bytes, length: int) -> None:
        self.words = words
        self._length = length

    def __len__(self) -> int:
        return len(self.words) // _PACKED.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = checked_index("run", index, len(self))
        start, leaf, offset = _PACKED.unpack_from(self.words, index * _PACKED.size)
        end = self._length
        if index + 1 < len(self):
            end = _PACKED.unpack_from(self.words, (index + 1) * _PACKED.size)[0]
        return Run(start, end, leaf, offset)


class OverlaySource:
    """Several sources, one over the other: a base image and the differences made since.

    Where pieces overlap, the later one in the list counts. With every driver, C puts files, buffers
    and zeros together, without Python for a page. A source in Python needs the "process" or the
    "thread" driver, and Python reads the pages that have bytes of it, and only these; it is asked
    for whole pages of 4096 bytes, which may reach beyond its piece.

    Args:
        pieces: Tuples (offset, length, source): where the piece begins in bytes, how long it is,
            and its content, beginning with the source's first byte. Offsets and lengths need no
            alignment. A length of None is the source's own. Anything that `Handler.serve` accepts
            is a source, another overlay included.
        gaps: Bytes between the pieces: "refuse" raises ValueError if there are any, "zeros" makes
            them zeros.
        length: The number of bytes; up to the end of the last piece by default.

    Raises:
        ValueError: no pieces, a gap that is refused, a piece that its source does not fill or that
            ends after `length`, or a length of None with a source that has no end.
        TypeError: not tuples of three, or something that is no page source.

    Example:
        >>> from pyuffd import OverlaySource
        >>> image = OverlaySource([(0, None, b"base" * 1024), (100, 3, b"new")])
        >>> image.length, image.read(98, 6)
        (4096, b'senewe')
    """

    def __init__(
        self,
        pieces: Iterable[tuple[int, int | None, SourceLike]],
        *,
        gaps: Gaps = "refuse",
        length: int | None = None,
    ) -> None:
        if gaps not in GAPS:
            raise ValueError(f"gaps {gaps!r} is not one of {', '.join(map(repr, GAPS))}")
        if length is not None:
            check_int("length", length, 1, LARGEST)
        painter = _Painter()
        for offset, size, source in reversed(list(_checked(pieces))):
            painter.put_below(offset, size, source)
        end = painter.end
        if length is not None and end > length:
            raise ValueError(f"the pieces end at {end:#x}, after length {length:#x}")
        self._length = length or end
        if not self._length:
            raise ValueError("an overlay without pieces needs a length, and gaps='zeros'")
        self.leaves: Sequence[PageSource] = painter.leaves
        self.runs: Sequence[Run] = _without_gaps(painter, self._length, gaps)

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, padded with zeros beyond the end."""
        check_part(offset, length)
        data = bytearray()
        for run in self.runs_in(offset, offset + length):
            data += self._read_run(run)
        return bytes(data).ljust(length, b"\0")

    def _read_run(self, run: Run) -> Buffer:
        leaf, length = self.leaves[run.leaf], run.end - run.start
        if isinstance(leaf, IN_C):
            return leaf.read(run.offset, length)
        # Functions are promised whole pages.
        first = round_down(run.offset, PAGE_SIZE)
        whole = round_up(run.offset + length, PAGE_SIZE) - first
        found = leaf.read(first, whole)
        if isinstance(found, Promised):
            raise ValueError(f"{leaf!r}: a part of an overlay cannot come by fill()")
        data = memoryview(found).cast("B")
        if len(data) != whole:
            raise ValueError(
                f"{leaf!r} returned {len(data):#x} bytes for {whole:#x} at offset {first:#x}"
            )
        return data[run.offset - first :][:length]

    def runs_in(self, start: int, end: int) -> Iterator[Run]:
        """Yield the runs of [start, end), the first and the last one cut to it."""
        at = bisect_right(self.runs, start, key=lambda run: run.end)
        while at < len(self.runs) and self.runs[at].start < end:
            yield self.runs[at].cut(start, end)
            at += 1

    @property
    def calls_python(self) -> bool:
        """Whether Python reads a leaf."""
        return not all(isinstance(leaf, IN_C) for leaf in self.leaves)

    def is_in_python(self, run: Run) -> bool:
        """Return whether Python reads the bytes of a run."""
        return not isinstance(self.leaves[run.leaf], IN_C)

    @classmethod
    def _of_runs(cls, leaves: Sequence[PageSource], runs: Sequence[Run], length: int) -> Self:
        """Return an overlay of runs that follow each other from 0 to `length`."""
        self = cls.__new__(cls)
        self._length, self.runs, self.leaves = length, runs, leaves
        return self

    @classmethod
    def _of_packed(cls, leaves: Sequence[PageSource], words: bytes, length: int) -> Self:
        """Return the same of runs that are packed, and whose leaves are long enough."""
        return cls._of_runs(leaves, PackedRuns(words, length), length)

    def with_leaves(self, leaves: Sequence[PageSource]) -> OverlaySource:
        """Return the same overlay of other sources, in the order of `leaves`."""
        other = OverlaySource.__new__(OverlaySource)
        other._length, other.runs, other.leaves = self._length, self.runs, leaves
        return other

    def __repr__(self) -> str:
        return f"OverlaySource({len(self.runs)} runs of {len(self.leaves)} sources)"


def _checked(
    pieces: Iterable[tuple[int, int | None, SourceLike]],
) -> Iterator[tuple[int, int, PageSource]]:
    if isinstance(pieces, (str, bytes, type)) or not isinstance(pieces, Iterable):
        raise TypeError(f"pieces must be tuples (offset, length, source), not {shown(pieces)}")
    known: dict[int, PageSource] = {}  # one source for an object that occurs several times
    kept = []  # so that no two objects have one id
    untyped: Iterable[object] = pieces
    for number, piece in enumerate(untyped):
        name = f"pieces[{number}]"
        if not isinstance(piece, tuple) or len(piece) != 3:
            raise TypeError(f"{name} must be a tuple (offset, length, source), not {shown(piece)}")
        offset, size, given = piece
        kept.append(given)
        check_int(f"{name} offset", offset, 0, LARGEST)
        if id(given) not in known:
            known[id(given)] = as_source(given, name)
        source = known[id(given)]
        length = source.length
        if size is None:
            size = length
        if size is None:
            raise ValueError(f"{name}: {repr_of(source)} has no end, so the piece needs a length")
        check_int(f"{name} length", size, 1, LARGEST)
        if length is not None and size > length:
            raise ValueError(
                f"{name} has {size:#x} bytes, but {repr_of(source)} has only {length:#x}"
            )
        yield offset, size, source


class SentFile:
    """Stands for a file among the leaves of an overlay that is sent to another process."""

    length = None

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, offset: int, length: int) -> bytes:
        """Raise: the file comes beside the overlay, as a descriptor."""
        raise RuntimeError(f"file {self.number} of an overlay did not arrive")


def without_files(source: OverlaySource) -> OverlaySource:
    """Return an overlay with the files taken out, which `with_files` puts back."""
    count = 0
    leaves: list[PageSource] = []
    for leaf in source.leaves:
        leaves.append(SentFile(count) if isinstance(leaf, FileSource) else leaf)
        count += isinstance(leaf, FileSource)
    return source.with_leaves(leaves)


def with_files(source: OverlaySource, files: Sequence[tuple[int, int]]) -> OverlaySource:
    """Return an overlay with its files, descriptors and offsets, put back."""

    def opened(fd: int, offset: int) -> FileSource:
        found = FileSource(fd, offset)
        found._warns = False
        return found

    leaves: list[PageSource] = []
    for leaf in source.leaves:
        leaves.append(opened(*files[leaf.number]) if isinstance(leaf, SentFile) else leaf)
    return source.with_leaves(leaves)


class _Painter:
    """Adds pieces below those that were added before."""

    def __init__(self) -> None:
        self.leaves: list[PageSource] = []
        self.runs: list[Run] = []
        self.end = 0
        self._numbers: dict[int, int] = {}
        # What is covered, as sorted spans that do not touch.
        self._starts: list[int] = []
        self._ends: list[int] = []

    def put_below(self, offset: int, length: int, source: PageSource) -> None:
        end = offset + length
        self.end = max(self.end, end)
        for start, stop in self._cover(offset, end):
            if isinstance(source, OverlaySource):
                for run in source.runs_in(start - offset, stop - offset):
                    leaf = self.number_of(source.leaves[run.leaf])
                    self.runs.append(Run(run.start + offset, run.end + offset, leaf, run.offset))
            else:
                self.runs.append(Run(start, stop, self.number_of(source), start - offset))

    def number_of(self, leaf: PageSource) -> int:
        number = self._numbers.setdefault(id(leaf), len(self.leaves))
        if number == len(self.leaves):
            self.leaves.append(leaf)
        return number

    def _cover(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cover [start, end), and return the parts that were not covered before."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        bounds = [start]
        for known, past in zip(self._starts[first:last], self._ends[first:last], strict=True):
            bounds += (known, past)
        bounds.append(end)
        self._starts[first:last] = [min([start, *self._starts[first:last]])]
        self._ends[first:last] = [max([end, *self._ends[first:last]])]
        return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]


def _without_gaps(painter: _Painter, length: int, gaps: Gaps) -> list[Run]:
    """Return the runs in order, with zeros in the gaps, and adjacent ones of one leaf joined."""
    found: list[Run] = []
    zeros = -1

    def add(run: Run) -> None:
        before = found[-1] if found else None
        if before and (before.leaf, before.offset + before.end - before.start) == (
            run.leaf,
            run.offset,
        ):
            found[-1] = before._replace(end=run.end)
        else:
            found.append(run)

    at = 0
    for run in [*sorted(painter.runs), Run(length, length, -1, 0)]:
        if at < run.start:
            if gaps == "refuse":
                raise ValueError(
                    f"no piece has the bytes from {at:#x} to {run.start:#x}: pass gaps='zeros' if"
                    " they are to be zeros"
                )
            if zeros < 0:
                zeros = painter.number_of(ZeroSource())
            add(Run(at, run.start, zeros, at))
        if run.start < length:
            add(run)
        at = run.end
    return found


def leaves_of(source: PageSource | None) -> Sequence[PageSource]:
    """Return the sources that this one consists of."""
    if source is None:
        return ()
    return source.leaves if isinstance(source, OverlaySource) else (source,)


def packed_runs(source: OverlaySource, length: int) -> tuple[list[PageSource], bytes]:
    """Return the leaves and runs of a range of `length` bytes, as `struct uffd_run_spec` has them.

    Bytes after the end of the source are zeros.

    Raises:
        ValueError: a leaf has become shorter than the overlay needs it.
    """
    if isinstance(source.runs, PackedRuns) and source.length == length:
        return list(source.leaves), source.runs.words
    numbers: dict[int, int] = {}
    past: dict[int, int] = {}  # how far each leaf is used
    packed = array("Q")
    for run in source.runs_in(0, length):
        packed.extend((run.start, numbers.setdefault(run.leaf, len(numbers)), run.offset))
        past[run.leaf] = max(past.get(run.leaf, 0), run.offset + run.end - run.start)
    leaves = [source.leaves[number] for number in numbers]
    for number, needed in past.items():
        leaf = source.leaves[number]
        if leaf.length is not None and leaf.length < needed:
            raise ValueError(
                f"{leaf!r} has {leaf.length:#x} bytes by now, and {needed:#x} are needed"
            )
    if source.length < length:
        packed.extend((source.length, len(leaves), 0))
        leaves.append(ZeroSource())
    return leaves, packed.tobytes()
