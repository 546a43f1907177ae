"""One served region: its content, its registration, its protection (layer L4)."""

from __future__ import annotations

import functools
import logging
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from pyuffd import _memory, lowlevel
from pyuffd._abi import Feature, Ioctl, RegisterMode
from pyuffd._arguments import check_flags
from pyuffd._describe import short_repr
from pyuffd._diagnose import mergeable
from pyuffd._errors import HelperLostError, UffdOSError
from pyuffd._latch import RLock
from pyuffd._left import Number
from pyuffd._pages import PAGE_SIZE, RangeLike, check_region, page_size_of
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._borrowed import Borrowed
from pyuffd.handlers._overlaps import Range
from pyuffd.handlers._served_parts import Part, reaches
from pyuffd.handlers._types import RangeId, SourceKind
from pyuffd.regions import Region, RegionKind
from pyuffd.regions._mapping import PROT_NONE
from pyuffd.sources import PageSource

log = logging.getLogger(__name__)

# Plain numbers: arithmetic with flags is slow, and a restore serves thousands of ranges.
_NEEDED_IOCTL = [
    (int(mode), int(ioctl))
    for mode, ioctl in (
        (RegisterMode.MISSING, Ioctl.COPY),
        (RegisterMode.WP, Ioctl.WRITEPROTECT),
        (RegisterMode.MINOR, Ioctl.CONTINUE),
    )
]
# Memory whose holes Linux write-protects even without Feature.WP_UNPOPULATED.
FILE_BACKED = {RegionKind.MEMFD, RegionKind.SHM, RegionKind.HUGETLBFS, RegionKind.FILE}


@dataclass(slots=True)
class Served:
    """A served region, and what must be undone when it is no longer served."""

    id: RangeId
    page_size: int
    mode: RegisterMode
    region: RangeLike
    uffd: Userfaultfd
    kind: SourceKind
    memory: list[Range]  # one for each part
    borrowed: Borrowed
    source: PageSource | None = None
    touched: tuple[RangeLike, ...] = ()  # other memory that the engine reads and writes for it
    ioctls: int = 0
    alias: Region | None = None
    is_private_file: bool | None = None  # some of it, of a file; None: not known yet
    is_held: bool = False  # by a thread that is left behind
    is_mergeable: bool = False  # by KSM, and the user has been warned
    preserves: bool = False
    was_protected: bool = False
    protections: int = 0  # how often it was protected
    # Held by evict() with a `write_back`: two calls could write different contents of a page in the
    # wrong order.
    evicting: RLock = field(default_factory=RLock)
    # Held by calls that may wait for its pages; acquired after `evicting`, before the handler's.
    changing: RLock = field(default_factory=RLock)
    on_close: list[Callable[[], None]] = field(default_factory=list)
    check: Callable[[int, int], None] | None = None  # before accesses of the region
    parts: list[Part] = field(default_factory=list)  # what is still served of the range

    def __post_init__(self) -> None:
        self.parts = self.parts or [(0, self.id.length)]

    @property
    def key(self) -> tuple[int, int]:
        """Its space, and the address where it begins."""
        return self.id.space, self.id.start + self.parts[0][0]

    @property
    def is_here(self) -> bool:
        """Whether it is memory of this process."""
        return self.memory[0].is_here

    def keep_mapped(self) -> None:
        """Keep a region's memory mapped until `let_unmap`, even if it is garbage."""
        if isinstance(self.region, Region):
            self.region._keep_mapped(id(self))

    def let_unmap(self) -> None:
        """Undo `keep_mapped`; may be called again."""
        if isinstance(self.region, Region):
            self.region._let_unmap(id(self))

    def spans(self) -> list[tuple[int, int]]:
        """Return start and length of each part."""
        return [(self.id.start + begin, end - begin) for begin, end in self.parts]

    def has_some_of(self, start: int, length: int) -> bool:
        """Return whether a part of it lies in the range."""
        begin = start - self.id.start
        return reaches(self.parts, begin, begin + length)


class MayHaveToEnd(Protocol):
    """A handler, as `OnClose` sees it."""

    @property
    def must_end(self) -> bool:
        """Whether it must stop before an object that it uses may be closed."""


H = TypeVar("H", bound=MayHaveToEnd)


class OnClose(Generic[H]):
    """The callback by which a handler, if it is alive, learns that an object it uses is closed.

    As long as `must_end` is true, the next close calls it again.
    """

    keeps: H | None = None  # where the handler is to live as long as what it uses

    def __init__(
        self,
        handler: H,
        end: Callable[[H], None],
        is_used: Callable[[H], bool],
    ) -> None:
        self._handler = weakref.ref(handler)
        self._end = end
        self._is_used = is_used

    def __call__(self) -> None:
        handler = self._handler()
        if handler is not None:
            self._end(handler)

    @property
    def must_end(self) -> bool:
        """Whether the callback has not done its work yet."""
        handler = self._handler()
        return handler is not None and handler.must_end and self._is_used(handler)


def check_local(local: RangeLike | None, length: int) -> None:
    """Raise ValueError unless `local` is memory of this process, and long enough."""
    if local is None:
        return
    from pyuffd.handover import HandoverRange  # rarely needed

    check_region(local, "local")
    if local.length < length:
        raise ValueError(f"local has {local.length:#x} bytes, fewer than the region's {length:#x}")
    if isinstance(local, HandoverRange):
        raise ValueError(
            f"local={short_repr(local)} is memory of another process: map its descriptor here, with"
            " Region.file(fd, length, offset=offset)"
        )
    if not isinstance(local, Region):
        try:
            _memory.look_at(os.getpid(), local.start, length)
        except UffdOSError as error:
            raise ValueError(
                f"local [{local.start:#x}, +{length:#x}) is not mapped in this process"
            ) from error


def is_shared(
    region: RangeLike, local: RangeLike | None, uffd: Userfaultfd, owner_pid: int
) -> bool:
    """Return whether forks share the region's memory; of private memory each has a copy."""
    stated = getattr(region, "shared", None)
    if stated is not None:
        return bool(stated)
    if owner_pid and uffd.features & Feature.EVENT_FORK:
        try:
            found = _memory.look_at(owner_pid, region.start, region.length)
        except UffdOSError:
            pass  # no permission to inspect the owner
        else:
            return bool(found & _memory.Maps.SHARED)
    # Memory that can be mapped here too is shared.
    return local is not None


def local_mapping(
    region: RangeLike, length: int, local: RangeLike | None, *, needed: bool
) -> tuple[Region | None, int]:
    """Return (a new alias, the address) of an unregistered mapping of the region's memory."""
    if local is not None:
        if needed and isinstance(local, Region) and not (local.shared and local.writable):
            raise ValueError(
                f"local={short_repr(local)} must be shared and writable to fill the page cache"
            )
        return None, local.start
    if not needed:
        return None, 0
    if not isinstance(region, Region):
        raise ValueError(
            "minor faults with a source need `local`, or a Region, of which an alias is made"
        )
    alias = region.alias()
    return alias, alias.start


def local_file(
    region: RangeLike, length: int, local: RangeLike | None, *, needed: bool
) -> tuple[int, int] | None:
    """Return descriptor and offset of the file that the worker process maps for a region."""
    if local is None and not needed:
        return None
    mapped = local or region
    if not isinstance(mapped, Region) or not mapped.shared or mapped.fd is None:
        raise ValueError(
            "with driver='process', minor faults with a source need `local`, or the region, to be"
            " a Region of shared memory with a descriptor, which the helper process maps too"
        )
    return mapped.fd, mapped.offset


def touched_by(
    region: RangeLike, local: RangeLike | None, preserve: object, *, writes_cache: bool
) -> tuple[RangeLike, ...]:
    """Return the memory that must stay mapped while the engine may work on the range's pages."""
    if local is not None and (preserve is not None or writes_cache):
        return (local,)
    return (region,) if preserve is not None else ()


def check_ioctls(ioctls: Ioctl | None, uffd: Userfaultfd, present: str | None) -> None:
    """Raise ValueError for ioctls of a range that this handler has to register itself."""
    if ioctls is None:
        return
    check_flags("ioctls", ioctls, Ioctl)
    if not uffd.adopted:
        raise ValueError(
            f"ioctls= is for memory that its owner registers, and {uffd!r} was opened here"
        )
    if present not in (None, "keep"):
        raise ValueError(f"present={present!r} with ioctls=: the memory may not be mapped yet")


def needed_ioctls(mode: RegisterMode) -> int:
    """Return the ioctls without which faults of these kinds cannot be resolved."""
    modes = int(mode)
    return sum(ioctl for each, ioctl in _NEEDED_IOCTL if modes & each)


def modes_before(uffd: Userfaultfd, start: int, length: int) -> RegisterMode:
    """Return the modes for which all of a range is registered, or 0 if that is not true of all."""
    rows = [] if uffd.adopted else uffd._registered.overlapping(start, start + length)
    if len(rows) == 1 and rows[0][:2] == (start, start + length):
        return rows[0][2]
    return RegisterMode(0)


def take_back(
    engine: Backend,
    uffd: Userfaultfd,
    place: tuple[int, int, int],
    granted: lowlevel.Granted,
    known: Collection[int],
    before: RegisterMode,
) -> None:
    """Undo the steps of serving [start, +length) of a space that have been done.

    `known` are the numbers of the ranges that are served: one of them may have begun there before.
    `before`: the modes for which it was registered.
    """
    space, start, length = place
    # Do not unregister another process's memory: its waiting threads would continue with zeros, as
    # would those that waited for missing pages before.
    unregister = bool(granted.ioctls or granted.is_unknown) and not uffd.adopted
    unregister = unregister and not before & RegisterMode.MISSING
    try:
        found = engine.find(space, start)
        if found is not None and found.number not in known:
            engine.unserve(found, seal=False, unregister=unregister)
        elif found is None and unregister:  # registered before the engine knew of it
            lowlevel.unregister(uffd.fileno(), start, length)
    except HelperLostError as error:
        log.debug("%s", error)
        if unregister:
            lowlevel.unregister(uffd.fileno(), start, length)
    except UffdOSError as error:
        log.debug("%s", error)
    if unregister and before:
        with suppress(UffdOSError):
            lowlevel.register(uffd.fileno(), start, length, before)
    elif unregister:
        uffd._note_unregistered(start, length)


def unregister_hidden(number: Number, spans: list[tuple[int, int]]) -> None:
    """Unregister memory that is about to be unmapped: nobody would read the event of that.

    Its threads go on as they would after munmap(2), with a signal. They find no zeros.
    """
    if not number.descriptor.is_open:
        return
    for start, length in spans:
        # Some of it may be unmapped already.
        with suppress(UffdOSError):
            _memory.mprotect(start, length, PROT_NONE)
            lowlevel.unregister(number.descriptor.number, start, length)
            lowlevel.wake(number.descriptor.number, start, length)


def tell_registered(engine: Backend, uffd: Userfaultfd, space: int) -> None:
    """Tell an engine all registered ranges, unless `uffd` is adopted and not all are known."""
    if not uffd.adopted:
        engine.list_registered(space, uffd._registered_ranges(), is_all=True)


def served_mode(
    all_served: Iterable[Served], uffd: Userfaultfd, start: int, length: int
) -> RegisterMode | None:
    """Return the modes that all served memory in a range has, or None without such memory."""
    modes = [one.mode for one in all_served if one.uffd is uffd and one.has_some_of(start, length)]
    return functools.reduce(operator.and_, modes) if modes else None


def leaves_holes(region: RangeLike, uffd: Userfaultfd, mode: RegisterMode) -> bool:
    """Return whether Linux may silently leave missing pages unprotected."""
    return (
        mode == RegisterMode.WP
        and not uffd.features & (Feature.WP_UNPOPULATED | Feature.WP_ASYNC)
        and not _is_file(region)
    )


def _is_file(region: RangeLike) -> bool:
    if isinstance(region, Region):
        return region.kind in FILE_BACKED
    # A range of another process with a descriptor is a file, and huge pages are files.
    return getattr(region, "fd", None) is not None or page_size_of(region) > PAGE_SIZE


def warn_of_merging(served: Served, stacklevel: int = 3) -> None:
    """Warn once of protected memory that KSM may merge, after which writes are not seen."""
    if served.is_mergeable or served.uffd.adopted:
        return
    start = served.id.start
    if vma := mergeable(start, start + served.id.length):
        served.is_mergeable = True
        warnings.warn(
            f"{vma} is mergeable by KSM, which drops write-protection, so that writes to merged"
            " pages may not be seen: call madvise(MADV_UNMERGEABLE) on it",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def maps_holes(region: RangeLike, uffd: Userfaultfd, mode: RegisterMode, owner_pid: int) -> bool:
    """Return whether the engine must map missing pages before it protects them."""
    if not leaves_holes(region, uffd, mode):
        return False
    if owner_pid == os.getpid():
        return True
    # Only in anonymous memory: mapping a hole of a file would fill it with zeros.
    found = _memory.look_at(owner_pid, region.start, region.length)
    return bool(found & _memory.Maps.ANONYMOUS)
