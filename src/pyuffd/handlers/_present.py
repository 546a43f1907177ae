"""Pages that are present before their range is served, and never cause a missing fault."""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from pyuffd import _memory, _vmas, lowlevel
from pyuffd._abi import Feature, Ioctl, PageBit, PageCategory, RegisterMode
from pyuffd._arguments import check_choice
from pyuffd._describe import counted
from pyuffd._diagnose import is_ordinary_file
from pyuffd._errors import (
    HandlerError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._owned import Descriptor
from pyuffd._pages import HUGE_PAGE_1G, HUGE_PAGE_2M, PAGE_SIZE, RangeLike
from pyuffd._source_files import name_in_proc
from pyuffd._uffd import Userfaultfd
from pyuffd._vmas import Vma
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._overlaps import FILLED
from pyuffd.handlers._serving import FILE_BACKED, Served, modes_before, needed_ioctls
from pyuffd.handlers._types import DropRacedError, IfPresent, Opening, PagesPresentError
from pyuffd.lowlevel import Granted
from pyuffd.pagemap import Pagemap, PageRanges
from pyuffd.regions import Region, RegionKind
from pyuffd.sources import PageSource

Present = Literal["refuse", "keep", "drop"]
POLICIES = ("refuse", "keep", "drop")
MADV_DONTNEED_LOCKED = 24  # Linux 5.18; not in the mmap module
THERE = PageCategory.PRESENT | PageCategory.SWAPPED
# A thread that touches the memory all the time gets in between in some of the attempts.
ATTEMPTS = 1000
_IF_PRESENT: dict[Present | None, IfPresent] = {
    None: IfPresent.ANY,
    "refuse": IfPresent.REFUSE,
    "keep": IfPresent.KEEP,
    "drop": IfPresent.DROP,
}


def choose_present(
    present: Present | None,
    region: RangeLike,
    source: PageSource | None,
    mode: RegisterMode,
    uffd: Userfaultfd,
    *,
    is_here: bool,
) -> Present | None:
    """Return what to do about pages that are present; raise ValueError if it is impossible.

    None: nothing, as for write-protection alone, which is about present pages.
    """
    is_filled = source is not None and int(mode) & FILLED
    if present is not None:
        check_choice("present", present, POLICIES)
    if present == "drop" and not is_filled:
        raise ValueError("present='drop' needs a source and RegisterMode.MISSING or MINOR")
    if present == "drop" and (not is_here or uffd.adopted or not isinstance(region, Region)):
        raise ValueError(
            "present='drop' needs a Region of this process (Region.at for memory that other code"
            " mapped): only the owner of memory can drop it"
        )
    if present == "drop" and isinstance(region, Region) and _comes_back(region):
        raise ValueError(
            f"present='drop' of {region!r}: without its own copies a private mapping shows the page"
            " cache of its file, so the pages would not get the source's content"
        )
    if not is_filled:
        return "keep" if present == "keep" else None
    if not is_here or uffd.adopted:
        return "keep"
    # Pages that an earlier handler filled hold its content; its poison marks are kept too.
    came_from_handler = isinstance(region, Region) and region.was_served
    return present or ("keep" if came_from_handler else "refuse")


def _comes_back(region: Region) -> bool:
    if region.kind is RegionKind.ADDRESS:
        return shows_cache(region, 0, region.length)
    is_file = region.kind in FILE_BACKED and region.page_size == PAGE_SIZE
    return is_file and not region.shared


def refuse_present(region: RangeLike, mode: RegisterMode, pagemap: Pagemap | None = None) -> None:
    """Refuse memory of this process of which pages are present, before anything is done.

    With `pagemap`, an open one of this process, none is opened. What is touched after this and
    before the registration, `open_range` finds.
    """
    if first := _first_there(region, pagemap):
        if _is_ordinary_file(region):
            return  # UFFDIO_REGISTER says what is wrong; its pages must not be dropped
        raise _present_error(region, first[0].start, _there(region).pages(_page_size_of(region)))
    # A page that only the cache has is a minor fault where those are served.
    if not int(mode) & RegisterMode.MINOR.value and isinstance(region, Region):
        _refuse_cached(region)


def _page_size_of(region: RangeLike) -> int:
    return region.page_size if isinstance(region, Region) else PAGE_SIZE


def _present_error(region: RangeLike, first: int, pages: int) -> ValueError:
    return ValueError(
        f"{counted(pages, 'page')} of [{region.start:#x}, +{region.length:#x})"
        f" {'is' if pages == 1 else 'are'} already present, the first at {first:#x}."
        " Present pages cause no missing fault, so they would never get the source's content."
        " Serve the region before it is touched, or pass present='drop' to drop these pages or"
        " present='keep' to keep what they hold"
    )


def _refuse_cached(region: Region) -> None:
    """Refuse shared memory whose file has pages: Linux maps them, without a missing fault.

    Pages that fallocate(2) has made are among them. They are zeros, and only the number of blocks
    tells of them, so they are noticed if the region is the whole file.
    """
    fd = region.fd
    if region.kind is RegionKind.ADDRESS:
        for vma in _file_mappings(region.start, region.length):
            if not _has_pages(vma, region.start, region.length):
                continue
            if not is_ordinary_file(vma):  # as above
                raise _cached_error(region)
        return
    if fd is None or region.kind not in FILE_BACKED:
        return
    status = os.fstat(fd)
    if not status.st_blocks:
        return
    start, end = region.offset, region.offset + region.length
    is_whole = start == 0 and end >= status.st_size
    if not is_whole and (region.page_size > PAGE_SIZE or not _has_data(fd, start, end)):
        return
    if _is_ordinary_file(region):
        return
    raise _cached_error(region)


def _is_ordinary_file(region: RangeLike) -> bool:
    end = region.start + region.length
    return any(is_ordinary_file(vma) for vma in _vmas.overlapping(region.start, end))


def _cached_error(region: Region) -> ValueError:
    return ValueError(
        f"pages of the file of {region!r} exist already: Linux maps them without a missing fault,"
        " so they would never get the source's content. Pass present='drop' to drop them, also for"
        " other mappings, present='keep' to keep what they hold, or serve RegisterMode.MINOR too"
    )


def shows_cache(region: RangeLike, offset: int, length: int) -> bool:
    """Return whether a private mapping, without its own copies, shows pages of its file's cache.

    Of memory that other code mapped (`Region.at`), a file that cannot be opened may have some.
    """
    if not isinstance(region, Region) or region.fd is None:
        return _is_unknown(region) and any(
            not vma.shared and _has_pages(vma, region.start + offset, length) is not False
            for vma in _file_mappings(region.start + offset, length)
        )
    if region.shared or region.kind not in FILE_BACKED or not os.fstat(region.fd).st_blocks:
        return False
    start = region.offset + offset
    # hugetlbfs does not tell which huge pages a file has.
    return region.page_size > PAGE_SIZE or _has_data(region.fd, start, start + length)


def is_private_file(region: RangeLike) -> bool:
    """Return whether some of it is a private mapping of a file."""
    if not _is_unknown(region):
        return not getattr(region, "shared", True)
    return any(not vma.shared for vma in _file_mappings(region.start, region.length))


def _is_unknown(region: RangeLike) -> bool:
    """Return whether only /proc tells what is mapped there."""
    return not isinstance(region, Region) or region.kind is RegionKind.ADDRESS


def _file_mappings(start: int, length: int) -> list[Vma]:
    """Return the mappings of files; of MAP_ANONYMOUS huge pages Linux shows one too."""
    return [
        vma
        for vma in _vmas.overlapping(start, start + length)
        if vma.has_file and (vma.shared or not vma.path.startswith("/anon_hugepage"))
    ]


def _has_pages(vma: Vma, start: int, length: int) -> bool | None:
    """Return whether the file of a mapping has pages in a range; None if it cannot be opened."""
    begin, end = max(vma.start, start), min(vma.end, start + length)
    with _file_of(vma) as file:
        if not file.is_open:
            return None
        status = os.fstat(file.number)
        if not status.st_blocks:
            return False
        if status.st_blksize in (HUGE_PAGE_2M, HUGE_PAGE_1G):
            return True  # hugetlbfs does not tell which ones
        to_file = vma.offset - vma.start
        return _has_data(file.number, begin + to_file, end + to_file)


def _file_of(vma: Vma) -> Descriptor:
    """Open the file of a mapping; the descriptor is empty if that is not possible."""
    names = [f"/proc/self/map_files/{vma.start:x}-{vma.end:x}"]  # needs a capability
    if vma.path.startswith("/"):
        names.append(vma.path)
    names += [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    for name in names:
        with suppress(OSError):
            status = os.stat(name)
            if (status.st_dev, status.st_ino) == (vma.device, vma.inode):
                return Descriptor.open(name, os.O_RDONLY)
    return Descriptor()


def _has_data(fd: int, start: int, end: int) -> bool:
    """Return whether a file has data in a range."""
    # Not by the region's descriptor: seeking moves the position of all its duplicates.
    with Descriptor.open(name_in_proc(fd), os.O_RDONLY) as file:
        try:
            return os.lseek(file.number, start, os.SEEK_DATA) < end
        except OSError:  # ENXIO: none from there on
            return False


def open_range(
    engine: Backend,
    served: Served,
    policy: Present | None,
    granted: Granted,
    *,
    started: bool,
    pagemap: Pagemap | None = None,
    poison: tuple[int, ...] = (),
) -> Ioctl:
    """Register a range of an engine, look for pages that are present, and begin to serve it.

    `started`: the engine runs. With `pagemap`, an open one of this process, none is opened.
    `poison`: offsets, (start, end) each, of pages that have no content. The caller calls
    `take_back` on failure.
    """
    uffd, region, place = served.uffd, served.region, served.id
    how = Opening(
        int(served.mode),
        _IF_PRESENT[policy],
        needed_ioctls(served.mode),
        int(modes_before(uffd, place.start, place.length)),
        stays_registered=uffd.adopted,
        reads_events=started,
        poison=poison,
    )

    def open_it() -> int:
        if policy == "drop" and engine.is_remote:
            return _open_dropped(engine, served, how, granted)
        return _opened(engine, served, how, granted, pagemap)

    try:
        return uffd._register_by(place.start, place.length, served.mode, open_it)
    except PagesPresentError as error:
        first = error.address
    except DropRacedError:
        raise HandlerError(
            f"present='drop' of {region!r}: other threads touch it all the time, and make pages of"
            f" zeros before it can be registered ({ATTEMPTS} attempts); start the handler first"
        ) from None
    pages = 1  # they may have been dropped meanwhile
    with suppress(UffdPermissionError):
        pages = max(1, _there(region).pages(_page_size_of(region)))
    raise _present_error(region, first, pages)


def _opened(
    engine: Backend, served: Served, how: Opening, granted: Granted, pagemap: Pagemap | None
) -> int:
    if pagemap is None and engine.is_remote and how.present is IfPresent.REFUSE:
        with suppress(UffdPermissionError), Pagemap() as opened:
            return engine.open(served.id, how, granted, opened)
    return engine.open(served.id, how, granted, pagemap)


def _open_dropped(engine: Backend, served: Served, how: Opening, granted: Granted) -> int:
    """Open memory that the engine's process cannot drop, after all of it was dropped here."""
    uffd, region, place = served.uffd, served.region, served.id
    assert isinstance(region, Region)
    refusing = how._replace(present=IfPresent.REFUSE)
    if how.reads_events or not uffd.features & Feature.EVENT_REMOVE:
        engine.list_registered(place.space, [(place.start, place.length)])
        return engine.open_dropped(place, refusing, granted, uffd.fileno(), shared=region.shared)
    # Nobody would read the event of dropping registered memory, and threads that touch memory that
    # is not registered make pages of zeros: try until none has.
    if not how.before:  # what cannot be registered keeps its content
        lowlevel.try_register(uffd.fileno(), place.start, place.length, how.mode)
    for _ in range(ATTEMPTS):
        _drop(region)
        with suppress(PagesPresentError):
            return _opened(engine, served, refusing, granted, None)
    raise DropRacedError


def first_touched(regions: Sequence[RangeLike], pagemap: Pagemap | None = None) -> RangeLike | None:
    """Return the first of these regions of which a page has been touched.

    With `pagemap`, an open one of this process, none is opened.
    """
    try:
        if pagemap is None:
            with Pagemap() as opened:
                return _first_touched(regions, opened)
        return _first_touched(regions, pagemap)
    except UffdPermissionError:
        return None


def _first_touched(regions: Sequence[RangeLike], pagemap: Pagemap) -> RangeLike | None:
    spans = array("Q", [number for each in regions for number in (each.start, each.length)])
    try:
        at = lowlevel.pagemap_first_of(pagemap.fileno(), spans, int(THERE))
    except UffdOSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):  # before Linux 6.7
            raise
        return next((each for each in regions if _scanned(pagemap, each, 1)), None)
    return regions[at] if at < len(regions) else None


def open_pagemap() -> Pagemap | None:
    """Open this process's page table to look at many regions; None if it cannot be read."""
    try:
        return Pagemap()
    except UffdPermissionError:
        return None


def _first_there(region: RangeLike, pagemap: Pagemap | None = None) -> PageRanges | None:
    """Return the first pages that are present; None if the page table cannot be read.

    The kernel forbids that to a process that has changed its uid (PR_GET_DUMPABLE is 0).
    """
    try:
        if pagemap is not None:
            return _scanned(pagemap, region, 1)
        return _there(region, at_most=1)
    except UffdPermissionError:
        return None


def _there(region: RangeLike, at_most: int | None = None) -> PageRanges:
    with Pagemap() as pagemap:
        return _scanned(pagemap, region, at_most)


def _scanned(pagemap: Pagemap, region: RangeLike, at_most: int | None) -> PageRanges:
    try:
        found = pagemap.scan(
            region.start, region.length, category_anyof_mask=THERE, vec_len=at_most
        )
    except UnsupportedFeatureError:  # before Linux 6.7
        entries = pagemap.read(region.start, region.length)
        present = entries.where(PageBit.PRESENT)
        return present if len(present) else entries.where(PageBit.SWAP)
    return found.ranges


def check_drop(region: RangeLike, uffd: Userfaultfd) -> None:
    """Raise ValueError for memory that cannot be dropped."""
    assert isinstance(region, Region)
    end = region.start + region.length
    if region.shared:
        region._pages(0, region.length, write=True)  # it is punched out of the file
    if uffd.features & Feature.EVENT_REMOVE and uffd._has_registered(region.start, end):
        raise ValueError(
            "present='drop' of a range that is registered with Feature.EVENT_REMOVE would wait"
            " until its event is read: drop the pages before registering the range"
        )


def _drop(region: Region) -> None:
    # In shared memory this removes poison marks.
    try:
        region.madvise(mmap.MADV_DONTNEED)
    except UffdOSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Locked memory: mlockall(MCL_FUTURE) fills it as it is mapped.
        _memory.madvise(region.start, region.length, MADV_DONTNEED_LOCKED)
    # Last: a page that is touched later is in the page table, where it is noticed.
    if region.shared:
        region.punch_hole()
