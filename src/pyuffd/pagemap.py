"""Page tables from user space: /proc/PID/pagemap and PAGEMAP_SCAN (layer L2).

Results stay packed, as the kernel wrote them: a Python object for a page or range is made only when
it is asked for.  Nothing here touches the memory in question, so nothing here faults there.  For
pages that no page table shows, `pyuffd._residency` tells where their content is.
"""

from __future__ import annotations

import errno
import os
import warnings
from dataclasses import dataclass
from operator import index
from typing import NoReturn

from pyuffd import lowlevel
from pyuffd._abi import PageCategory, ScanFlag
from pyuffd._arguments import check_flags, check_int, check_pid
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, UffdOSError, UnsupportedFeatureError, raise_errno
from pyuffd._machine import why_no_procfs
from pyuffd._owned import Descriptor
from pyuffd._page_ranges import PageEntries, PageRange, PageRanges
from pyuffd._pages import RangeLike, check_range, resolve_range
from pyuffd._refusals import why_no_ptrace

__all__ = ["PageEntries", "PageRange", "PageRanges", "Pagemap", "ScanResult"]

MASK_LIMIT = 1 << 64

_MASKS = ("category_mask", "category_anyof_mask", "category_inverted", "return_mask")


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The result of `Pagemap.scan`.

    Attributes:
        ranges: The matching pages.
        walk_end: Where the walk ended: the end of the range or, if `vec_len` or `max_pages` was
            reached before, the address from which to continue.
    """

    ranges: PageRanges
    walk_end: int

    def __repr__(self) -> str:
        return f"ScanResult({self.ranges!r}, walk_end={self.walk_end:#x})"


def _why_none() -> str:
    """Return why this process finds no pagemap of its own."""
    return why_no_procfs() or "this kernel was built without CONFIG_PROC_PAGE_MONITOR"


def check_proc() -> None:
    """Raise UffdOSError if /proc is of another PID namespace, where ids mean other processes.

    It stays mounted in a namespace that `unshare --pid` or clone(2) has made.
    """
    try:
        there = int(os.readlink("/proc/self"))
    except (OSError, ValueError):  # what opens a file there says so
        return
    if there != os.getpid():
        raise UffdOSError(
            errno.ENOENT,
            "look for a process in /proc",
            hint=f"procfs there is of another PID namespace, in which this process is {there} and"
            f" not {os.getpid()}: `mount -t proc proc /proc`",
        )


class Pagemap(Closing):
    """Open /proc/PID/pagemap: the page table of this process, or of another one.

    It belongs to the address space that the process has when it is opened. After the process's exit
    or execve(2), calls raise ProcessGoneError. A Pagemap of this process raises ClosedError in a
    forked child, which must open another one.

    Args:
        pid: The process; None for this one. Another user's process needs CAP_SYS_PTRACE.

    Raises:
        ValueError: a `pid` below 1.
        ProcessGoneError: ESRCH - there is no such process.
        UffdPermissionError: EACCES - no permission to ptrace the process.
        UffdOSError: ENOENT - no procfs is mounted or, with a `pid`, that of another PID namespace.

    Threads: safe, except for `close` while another thread is inside a call.

    Example:
        >>> import mmap, pyuffd
        >>> with pyuffd.Region.anonymous(16 * 4096) as region, pyuffd.Pagemap() as pagemap:
        ...     region.write(4096, b"x")
        ...     pagemap.read(region).where(pyuffd.PageBit.PRESENT).pages()
        1
    """

    _failed = "closing the pagemap failed"
    _instead = "open another with Pagemap(pid)"

    def __init__(self, pid: int | None = None) -> None:
        check_pid("pid", pid)
        if pid is not None:
            check_proc()
        self._pid = pid
        self._owner = os.getpid()
        path = f"/proc/{'self' if pid is None else index(pid)}/pagemap"
        try:
            self._descriptor = Descriptor.open(path, os.O_RDONLY)
        except OSError as error:
            code = error.errno or errno.EIO
            if code == errno.ENOENT and (pid is None or why_no_procfs()):
                raise UffdOSError(code, f"open {path}", hint=_why_none()) from None
            if code == errno.ENOENT:
                code = errno.ESRCH
            raise_errno(
                f"open {path}",
                code,
                hint=why_no_ptrace(pid, attaching=False)
                if pid is not None and code in (errno.EACCES, errno.EPERM)
                else "",
            )

    @property
    def pid(self) -> int:
        """The process for which it was opened."""
        return self._owner if self._pid is None else self._pid

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._descriptor.is_open

    def fileno(self) -> int:
        """Return the file descriptor, which stays this object's.

        Raises:
            ClosedError: it was closed, or it is the Pagemap of the process that forked this one.
        """
        fd = self._descriptor.number
        if fd < 0:
            raise ClosedError("this pagemap is closed")
        if self._pid is None and self._owner != os.getpid():
            raise ClosedError(
                f"this pagemap belongs to process {self._owner}, not to its fork {os.getpid()}"
            )
        return fd

    def _check_usable(self) -> None:
        self.fileno()

    def close(self) -> None:
        """Close the file descriptor; a second call does nothing."""
        self._descriptor.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor") and self._descriptor.is_open:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._descriptor.number}"
        return f"<Pagemap of {'this process' if self._pid is None else self._pid}: {state}>"

    def read(self, range_or_start: RangeLike | int, length: int | None = None) -> PageEntries:
        """Read the entries of a range in one bulk read.

        Args:
            range_or_start: A range object, or an address; a multiple of 4 KiB.
            length: Bytes, a multiple of 4 KiB; with an address only.

        Returns:
            One entry for each 4 KiB; 0 where nothing is mapped.

        Raises:
            ProcessGoneError: ESRCH - the address space is gone.
            UffdOSError: EFAULT - the range extends beyond the address space.
            ClosedError: as for `fileno`.

        Kernel: frame numbers (bits 0-54) are 0 without CAP_SYS_ADMIN.
        GIL: released.
        Blocks: no.
        """
        start, length = _checked(range_or_start, length)
        return PageEntries(start, lowlevel.pagemap_read(self.fileno(), start, length))

    def scan(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        category_mask: PageCategory = PageCategory(0),  # noqa: B008 - an immutable flag
        category_anyof_mask: PageCategory = PageCategory(0),  # noqa: B008
        category_inverted: PageCategory = PageCategory(0),  # noqa: B008
        return_mask: PageCategory | None = None,
        max_pages: int = 0,
        vec_len: int | None = None,
        flags: ScanFlag = ScanFlag(0),  # noqa: B008
    ) -> ScanResult:
        """PAGEMAP_SCAN of a range, repeated until the whole range is walked.

        A page matches if, after the categories in `category_inverted` are flipped, it has all of
        `category_mask` and, unless that is 0, at least one of `category_anyof_mask`.

        Args:
            range_or_start: A range object, or an address; a multiple of 4 KiB.
            length: Bytes, a multiple of 4 KiB; with an address only.
            category_mask: A page must have all of these.
            category_anyof_mask: And at least one of these.
            category_inverted: Flip these first.
            return_mask: Categories to report; a range ends where they change. None for those of
                the two masks.
            max_pages: Stop after this many matching pages of 4 KiB; 0 for no limit.
            vec_len: Stop after this many ranges, to bound the memory of the result. None for no
                limit; 0 reports none, for a scan that only write-protects (WP_MATCHING).
            flags: WP_MATCHING write-protects the matching pages in the same step that reports them.
                CHECK_WPASYNC refuses memory that is not registered for WP with Feature.WP_ASYNC.

        Returns:
            The matching pages, and where the walk ended.

        Raises:
            UnsupportedFeatureError: ENOTTY - no PAGEMAP_SCAN; EINVAL - an unknown category or
                flag, see `missing`.
            UffdPermissionError: EPERM - CHECK_WPASYNC met memory that is not WP_ASYNC.
            ProcessGoneError: ESRCH - the address space is gone.
            UffdOSError: EFAULT - the range extends beyond the address space; ENOSPC - WP_MATCHING
                with a `max_pages` smaller than the first matching hugetlb page.
            Each of these has `partial`, the ScanResult up to the error. With WP_MATCHING its pages
            are protected again, so another scan does not report them.

        Kernel: Linux 6.7. WRITTEN means that a page is not write-protected. Memory that was never
            protected therefore counts as written, and so does a hole without a marker, unless its
            whole page table is missing. On hugetlb memory only pages that are
            present or poisoned can be WRITTEN. Where the kernel has Feature.RWP, only memory
            registered for write-protect faults can.
        GIL: released.
        Blocks: no.
        """
        start, length = _checked(range_or_start, length)
        masks = (category_mask, category_anyof_mask, category_inverted, return_mask or 0)
        for name, mask in zip(_MASKS, masks, strict=True):
            check_flags(name, mask, PageCategory)
        check_flags("flags", flags, ScanFlag)
        check_int("max_pages", max_pages, 0)
        if vec_len is not None:
            check_int("vec_len", vec_len, 0)
        # Plain numbers from here on: IntFlag arithmetic is as slow as a small scan.
        wanted, anyof = int(category_mask), int(category_anyof_mask)
        inverted, flag_bits = int(category_inverted), int(flags)
        reported = wanted | anyof if return_mask is None else int(return_mask)
        limit = MASK_LIMIT - 1 if vec_len is None else vec_len
        if max_pages and not limit:
            raise ValueError(f"max_pages {max_pages:#x} has no effect with vec_len 0")
        fd = self.fileno()
        packed, walk_end, code = lowlevel.pagemap_scan_all(
            fd,
            start,
            (start + length) % MASK_LIMIT,
            flags=flag_bits,
            vec_len=limit,
            max_pages=max_pages,
            category_inverted=inverted,
            category_mask=wanted,
            category_anyof_mask=anyof,
            return_mask=reported,
        )
        result = ScanResult(PageRanges(packed), walk_end)
        if code:
            categories = wanted | anyof | inverted | reported
            self._raise_scan(code, start, length, categories, flag_bits, result)
        if self._pid is not None:
            try:
                lowlevel.pagemap_alive(fd)
            except UffdOSError as error:
                raise_errno(
                    "PAGEMAP_SCAN", error.errno or errno.ESRCH, start, length, partial=result
                )
        return result

    def scan_support(self) -> tuple[PageCategory, ScanFlag]:
        """Return the categories and flags that PAGEMAP_SCAN supports here; none without it.

        GIL: released.
        """
        fd = self.fileno()

        def takes(**argument: int) -> bool:
            try:
                lowlevel.pagemap_scan(fd, 0, 0, **argument)
            except UffdOSError as error:
                if error.errno in (errno.EINVAL, errno.ENOTTY):
                    return False
                raise
            return True

        bits = [1 << number for number in range(64)]
        categories = sum(bit for bit in bits if takes(return_mask=bit))
        return PageCategory(categories), ScanFlag(sum(bit for bit in bits if takes(flags=bit)))

    def _raise_scan(
        self, code: int, start: int, length: int, categories: int, flags: int, partial: ScanResult
    ) -> NoReturn:
        hint = ""
        if code in (errno.EINVAL, errno.ENOTTY):
            known_categories, known_flags = map(int, self.scan_support())
            requested, supported = categories, known_categories
            if flags & ~known_flags:
                requested, supported = flags, known_flags
            if code == errno.ENOTTY:
                hint = "this kernel has no PAGEMAP_SCAN (Linux 6.7)"
            if hint or requested & ~supported:
                raise UnsupportedFeatureError(
                    code,
                    "PAGEMAP_SCAN",
                    start,
                    length,
                    hint,
                    requested=requested,
                    supported=supported,
                    missing=requested & ~supported,
                    partial=partial,
                )
        elif code == errno.ENOSPC:
            hint = "max_pages is smaller than a hugetlb page, which is only protected as a whole"
        elif code == errno.EPERM:
            hint = (
                "CHECK_WPASYNC met memory that is not registered for RegisterMode.WP with"
                f" Feature.WP_ASYNC, at {partial.walk_end:#x} or after it"
            )
        raise_errno("PAGEMAP_SCAN", code, start, length, hint=hint, partial=partial)


def _checked(range_or_start: RangeLike | int, length: int | None) -> tuple[int, int]:
    start, length = resolve_range(range_or_start, length)
    check_range(start, length)
    return start, length
