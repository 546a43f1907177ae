"""`Region`: one mapped range of memory, and everything done to it without holding the GIL."""

from __future__ import annotations

import builtins
import errno
import mmap
import os
import warnings
import weakref
from threading import RLock
from typing import TYPE_CHECKING, Self

from pyuffd import _machine, _memory
from pyuffd._closing import CloseCallbacks
from pyuffd._errors import ClosedError, PagePoisonedError, raise_errno
from pyuffd._pages import PAGE_SIZE, check_aligned, round_down
from pyuffd.regions import _create, _files
from pyuffd.regions._files import FileLike
from pyuffd.regions._mapping import Mapping, RegionKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from pyuffd._residency import Residency

MADV_PAGEOUT = 21  # Linux 5.4; not in the mmap module
DIGEST_PART = 256 << 10  # stays in the cache between copying and hashing


class Region(CloseCallbacks):
    """A range of mapped memory; made by one of the class methods, never directly.

    It may be registered with a `Userfaultfd`, so its methods touch it only through C calls that
    release the GIL; `memoryview()` and numpy arrays over it do not, and are for memory whose
    faults are resolved by a native handler or another process.

    Attributes:
        start: First address. ClosedError once closed: the range may be somebody else's by then.
        length: Bytes, a multiple of the page size; also `len(region)`.
        page_size: The unit of its faults: 4096, or the huge page size.
        kind: What is behind it.
        fd: Its own descriptor of that, or None; closed with the region.
        shared: Writes go to the file, where other mappings see them.
        writable: False for a read-only mapping.
        offset: Where in the file it begins, in bytes.
        was_served: A Handler has served it: what it holds came from there.

    A fork's copy of the region is the child's own: it may be used, and closing it unmaps it there
    only. The callbacks of `on_close` and `unlink` stay with the process that made the region.

    GIL: released in every method that touches or maps memory.  Threads: safe, apart from
        close().  Blocks: a method that touches memory waits until the faults it causes are
        resolved.

    Example:
        >>> from pyuffd import Region
        >>> with Region.memfd(8192) as region, region.alias() as alias:
        ...     region.write(4096, b"seen twice")
        ...     alias.read(4096, 10)
        b'seen twice'
    """

    _what = "region"
    _instead = (
        "map the same memory once more with alias() or, in another process that was sent its fd,"
        " with Region.file(fd); a fork has it already"
    )

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._pid = os.getpid()
        self._before_close = []
        self.was_served = False
        self._exports: list[weakref.ref[Buffer]] = []  # buffers over the memory
        self._exports_lock = RLock()
        self._why_lost: list[Callable[[int], BaseException | None]] = []
        self._open = True  # last: a signal's exception may leave the rest undone

    # Constructors

    @classmethod
    def anonymous(
        cls, length: int, *, huge_page_size: int | None = None, noreserve: bool = False
    ) -> Self:
        """Map private anonymous memory, zeros until written.

        From 2 MiB on it is aligned to 2 MiB, so that transparent huge pages fit.

        Args:
            length: Bytes, a multiple of the page size.
            huge_page_size: Use hugetlb pages of this size in bytes instead.
            noreserve: Map more than the machine has, of which only a part will be used: Linux
                refuses more than its memory and swap at once otherwise (vm.overcommit_memory).
                What is used must still be there: no free huge page is SIGBUS, and too little
                memory the out-of-memory killer.

        Raises:
            ValueError: a bad length, or a huge page size this machine does not have.
            UffdOSError: ENOMEM - `hint` names the limit: vm.overcommit_memory, vm.max_map_count,
                a resource limit, or too few huge pages; then it says how many are free and the
                command for more, and `needed_pages` and `free_pages` are set.
                EAGAIN - memory is locked as it is mapped, and RLIMIT_MEMLOCK is too low.

        Kernel: mmap(2). Huge pages are reserved here, so touching them later cannot fail, unless
            `noreserve` says not to.
        """
        return cls(_create.anonymous(length, huge_page_size, noreserve=noreserve))

    @classmethod
    def memfd(
        cls,
        length: int,
        *,
        shared: bool = True,
        huge_page_size: int | None = None,
        seal: bool = False,
        noreserve: bool = False,
    ) -> Self:
        """Map a new memfd, which can be mapped again (`alias`) and sent to other processes.

        Args:
            length: Bytes, a multiple of the page size.
            shared: False maps it copy-on-write; the memfd itself stays zeros.
            huge_page_size: Make it of hugetlb pages of this size in bytes.
            seal: Fix its size and its seals, so that nobody it is sent to can truncate it and
                turn this mapping's pages into SIGBUS.
            noreserve: As for `anonymous`; of use with shared=False, and for huge pages.

        Raises:
            ValueError: as for `anonymous`.
            UffdOSError: as for `anonymous`.

        Kernel: memfd_create(2).
        """
        return cls(
            _create.memfd(
                length,
                shared=shared,
                huge_page_size=huge_page_size,
                seal=seal,
                noreserve=noreserve,
            )
        )

    @classmethod
    def shm(cls, name: str, length: int, *, reserve: bool = False, unlink: bool = False) -> Self:
        """Create or open POSIX shared memory, a file in /dev/shm.

        Args:
            name: As for shm_open(3), "/name" or "name".
            length: Bytes, a multiple of the page size; what exists must be at least as long.
            reserve: As for `file`.
            unlink: Remove the name when this region is closed.

        Raises:
            ValueError: a bad name or length, or existing memory that is shorter.
            UffdOSError: ENOSPC - /dev/shm is too full.
            OSError: the name exists and may not be opened.
        """
        mapping = _create.shm(name, length, reserve=reserve)
        return mapping.name.settle(unlink, cls(mapping))  # until here a new file goes with it

    @classmethod
    def hugetlbfs(
        cls,
        path: str | os.PathLike[str],
        length: int,
        *,
        shared: bool = True,
        unlink: bool = False,
        noreserve: bool = False,
    ) -> Self:
        """Create or open a file on a hugetlbfs mount; the mount says the page size.

        Args:
            path: The file.
            length: Bytes, a multiple of that page size; an existing file must be as long.
            shared: False maps it copy-on-write.
            unlink: Remove the file when this region is closed.
            noreserve: As for `anonymous`: reserve no huge pages.

        Raises:
            ValueError: a bad length, a shorter file, or a path that is not on hugetlbfs.
            UffdOSError: ENOMEM - too few huge pages in the pool or on the mount; see `anonymous`.
            OSError: the file cannot be opened or created.
        """
        mapping = _create.hugetlbfs(os.fspath(path), length, shared=shared, noreserve=noreserve)
        return mapping.name.settle(unlink, cls(mapping))

    @classmethod
    def file(
        cls,
        file: FileLike,
        length: int | None = None,
        *,
        offset: int = 0,
        shared: bool = True,
        writable: bool = True,
        reserve: bool = False,
        noreserve: bool = False,
    ) -> Self:
        """Map part of an existing file: on tmpfs, a received memfd, on hugetlbfs.

        userfaultfd serves tmpfs, memfd and hugetlb; other files are mapped, but not registered.
        A file truncated afterwards gives SIGBUS, which only a sealed memfd rules out.

        Args:
            file: A path, a descriptor or an open file. It stays the caller's: the region uses a
                duplicate.
            length: Bytes, a multiple of the page size; up to the end of the file by default.
            offset: Where in the file to begin, a multiple of the page size.
            shared: False maps it copy-on-write.
            writable: False maps it read-only. Linux registers a shared mapping with a userfaultfd
                only if its descriptor is open for writing (EPERM).
            reserve: Allocate all of it now, so that touching it cannot fail for lack of space.
                Its pages are then in the page cache: they give minor faults, not missing ones.
                Without it only space that is certain to be lacking is noticed.
            noreserve: As for `anonymous`; of use with shared=False, and for huge pages.

        Raises:
            ValueError: a bad length or offset, a file that ends before the region, not a regular
                file, or `reserve` and `noreserve` at once.
            UffdPermissionError: EACCES - shared and writable of a descriptor that is read-only
                or sealed against writing.
            UffdOSError: ENOSPC - the file system is too full: touching the region would be
                SIGBUS. ENOMEM - too few huge pages; see `anonymous`.
            OSError: the file cannot be opened.
        """
        return cls(
            _create.file(
                file,
                length,
                offset=offset,
                shared=shared,
                writable=writable,
                reserve=reserve,
                noreserve=noreserve,
            )
        )

    @classmethod
    def at(cls, address: int, length: int, page_size: int | None = None) -> Self:
        """Describe memory of this process that somebody else mapped; never unmapped from here.

        Args:
            address: First byte, aligned to the page size.
            length: Bytes, a multiple of the page size.
            page_size: The size of its pages, taken on trust; None asks /proc/self/smaps, which
                takes time in a process with many mappings.

        Raises:
            ValueError: not aligned, or not mapped, readable and of one kind throughout.
        """
        return cls(_create.at(address, length, page_size))

    def alias(self) -> Self:
        """Map the same memory a second time; what one writes the other sees.

        The new region owns a duplicate of the descriptor and is writable if the descriptor is.
        Filling a page through it and resolving the fault with UFFDIO_CONTINUE is what minor
        faults are for.

        Raises:
            ValueError: private memory, or shared memory that was adopted with `at`.
            UffdOSError: ENOMEM - no room for it.
        """
        self._check_open()
        return type(self)(_create.alias(self._mapping))

    # What it is

    @property
    def start(self) -> int:
        """First address."""
        self._check_open()
        return self._mapping.start

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self._mapping.length

    @property
    def page_size(self) -> int:
        """Size of its pages in bytes."""
        return self._mapping.page_size

    @property
    def kind(self) -> RegionKind:
        """What is behind it."""
        return self._mapping.kind

    @property
    def fd(self) -> int | None:
        """The descriptor of the memory behind it, or None; it stays the region's."""
        return self._mapping.fd if self._open else None

    @property
    def shared(self) -> bool:
        """Whether writes go to the file."""
        return self._mapping.shared

    @property
    def writable(self) -> bool:
        """Whether it may be written."""
        return self._mapping.writable

    @property
    def offset(self) -> int:
        """Where in its file it begins, in bytes."""
        return self._mapping.offset

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._open

    def __len__(self) -> int:
        return self._mapping.length

    def __repr__(self) -> str:
        it = self._mapping
        place = f"[{it.start:#x}, +{it.length:#x})" if self._open else "closed"
        sharing = "shared" if it.shared else "private"
        return f"<Region {place} {it.kind.value} {sharing} page_size={it.page_size:#x}>"

    # Its content

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset` on; to the end by default.

        Raises:
            PagePoisonedError: a page's content is lost; also from `write`, `fill`, `touch` and
                `digest`. A view or an array over such a page raises SIGBUS.
            UffdOSError: EFAULT - SIGBUS for another reason, which `hint` names: a file that was
                truncated, or no huge page left.
        """
        at, length = self._span(offset, length)
        try:
            return _memory.read(at, length)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy a contiguous buffer to `offset`."""
        at, _ = self._span(offset, memoryview(data).nbytes, write=True)
        try:
            _memory.write(at, data)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)

    def fill(self, value: int, offset: int = 0, length: int | None = None) -> None:
        """Set every byte, or those of a part, to `value`."""
        if not 0 <= value <= 255:
            raise ValueError(f"byte value {value} is not in 0..255")
        at, length = self._span(offset, length, write=True)
        try:
            _memory.fill(at, length, value)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)

    def touch(self, offset: int = 0, length: int | None = None, write: bool = False) -> None:
        """Access every page of a part once, so that it is there; with `write`, writable.

        A write puts back the byte it found, which another thread's write to that byte may lose.
        """
        at, length = self._span(offset, length, write=write)
        first = round_down(at, self.page_size)
        try:
            _memory.touch(first, at + length - first, self.page_size, write=write)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)

    def digest(self, name: str = "sha256", offset: int = 0, length: int | None = None) -> bytes:
        """Return the digest of the content, or of a part, by a hashlib algorithm."""
        import hashlib  # 2 ms of import that few programs need

        at, length = self._span(offset, length)
        state = hashlib.new(name)
        part = bytearray(min(length, DIGEST_PART))
        for done in range(0, length, DIGEST_PART):
            if length - done < len(part):
                del part[length - done :]
            # Not hashed in place, where a page that is lost would be SIGBUS.
            try:
                _memory.read_into(part, at + done)
            except PagePoisonedError as error:
                raise self._here(error) from self._cause_of(error)
            state.update(part)
        return state.digest()

    def on_loss(self, why: Callable[[int], BaseException | None]) -> None:
        """Ask `why` about a page that turns out to be lost, by its address; for handlers."""
        self._why_lost.append(why)

    def _here(self, error: PagePoisonedError) -> PagePoisonedError:
        """Say where in this region the page is."""
        page, start = error.start or 0, self._mapping.start
        if not start <= page < start + self.length:
            return error  # in what is written, or read into
        return PagePoisonedError(
            error.errno or 0,
            error.op,
            page,
            error.length,
            error.hint,
            address=error.address,
            offset=page - start,
        )

    def _cause_of(self, error: PagePoisonedError) -> BaseException | None:
        causes = (why(error.start or 0) for why in reversed(self._why_lost))
        return next((cause for cause in causes if cause is not None), None)

    # Its pages

    def madvise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """Give advice (mmap.MADV_*) about whole pages.

        Raises:
            ValueError: offset or length not a multiple of the page size.
            UffdOSError: the kernel's errno.

        Blocks: MADV_DONTNEED, MADV_REMOVE and MADV_FREE, until the Remove event is read where
            Feature.EVENT_REMOVE is on.
        """
        at, length = self._pages(offset, length)
        _memory.madvise(at, length, advice)

    def advise_thp(self, enable: bool = True, offset: int = 0, length: int | None = None) -> None:
        """Ask for transparent huge pages here, or refuse them.

        Raises:
            ValueError: hugetlb memory, which has its own.
            UffdOSError: EINVAL - a kernel without CONFIG_TRANSPARENT_HUGEPAGE.

        Kernel: MADV_HUGEPAGE, MADV_NOHUGEPAGE; whether shared memory follows is decided by
            /sys/kernel/mm/transparent_hugepage/shmem_enabled.
        """
        if self.page_size != PAGE_SIZE:
            raise ValueError(f"{self!r} is hugetlb memory: no transparent huge pages")
        self.madvise(mmap.MADV_HUGEPAGE if enable else mmap.MADV_NOHUGEPAGE, offset, length)

    def pageout(self, offset: int = 0, length: int | None = None) -> None:
        """Ask the kernel to move pages out to swap; `residency()` tells which went.

        Pages that others map too stay, and shared ones are RESIDENT until they are written.
        Without swap Linux would return success and keep every page, so that is an error here.

        Raises:
            ValueError: hugetlb memory, which is never swapped; or not whole pages.
            UffdOSError: ENOSPC - no swap, or none free.

        Kernel: MADV_PAGEOUT; Linux 5.4.
        """
        if self.page_size != PAGE_SIZE:
            raise ValueError(f"{self!r} is hugetlb memory, which is never swapped")
        at, length = self._pages(offset, length)
        is_on_disk = self.shared and self.fd is not None and not _files.facts(self.fd).in_memory
        if not is_on_disk and (problem := _machine.swap_problem()):
            raise_errno("MADV_PAGEOUT", errno.ENOSPC, at, length, hint=problem)
        _memory.madvise(at, length, MADV_PAGEOUT)

    def punch_hole(self, offset: int = 0, length: int | None = None) -> None:
        """Give the memory of whole pages back.

        Shared memory loses the pages in every mapping and reads as zeros. Private memory loses
        this mapping's own copies only: anonymous memory reads as zeros, a private file mapping
        as the file, whose pages stay in the page cache.

        Raises:
            ValueError: offset or length not a multiple of the page size, or read-only memory.
            UffdOSError: EPERM - sealed against writing; EOPNOTSUPP - the file system cannot.

        Kernel: MADV_REMOVE (which punches the hole that fallocate(2) would, and unlike it sends
            a Remove event), MADV_DONTNEED for private memory.
        Blocks: until the Remove event is read where Feature.EVENT_REMOVE is on.
        """
        at, length = self._pages(offset, length, write=True)
        _memory.madvise(at, length, mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED)

    def residency(self, offset: int = 0, length: int | None = None) -> Residency:
        """Tell for each page whether it is a hole, swapped out, resident or mapped here.

        Raises:
            ValueError: offset or length not a multiple of the page size.

        Kernel: /proc/self/pagemap, mincore(2) and SEEK_DATA.  Blocks: no; it touches no page.
        """
        from pyuffd._residency import residency  # 5 ms

        at, length = self._pages(offset, length)
        return residency(at, length, page_size=self.page_size, fd=self.fd)

    # Python's own view of it

    def memoryview(self) -> builtins.memoryview:
        """Return a view of the memory, without copying.

        While it, a slice of it or an array over it lives, the memory stays mapped, also after
        close().

        GIL: held while Python reads or writes through it: on registered memory only where faults
            are resolved by a native handler or another process.
        """
        start, length = self._span(0, None)
        return self._export(start, length)

    @property
    def __array_interface__(self) -> dict[str, object]:
        """What `numpy.asarray(region)` asks for: the bytes, not copied; rules as `memoryview`."""
        return {
            "version": 3,
            "shape": (self.length,),
            "typestr": "|u1",
            "data": self.memoryview(),
        }

    def _export(self, start: int, length: int) -> builtins.memoryview:
        """Return a view that keeps this region alive and its memory mapped."""
        buffer = _memory.buffer_of(start, length, keeps=(self, self._mapping.memory))
        with self._exports_lock:
            self._exports = [*self._living_exports(), weakref.ref(buffer)]
        view = memoryview(buffer)
        return view if self.writable else view.toreadonly()

    def _living_exports(self) -> list[weakref.ref[Buffer]]:
        # Asked, not told: an exception in a weak reference's callback would be lost.
        return [buffer for buffer in self._exports if buffer() is not None]

    # Its end

    def outlives_close(self) -> bool:
        """Whether the memory stays mapped when the region is closed now.

        It does where it was adopted with `at`, or while a memoryview or array over it is alive.
        """
        return not self._mapping.memory.start or bool(self._living_exports())

    def close(self) -> None:
        """Stop the handlers that serve it, unmap it (not after `at`) and close its descriptor.

        While memoryviews or arrays over it are alive the memory stays mapped, until the last of
        them is gone. What a handler had not filled is poisoned then, as by `Handler.unserve`.

        Blocks: until the Unmap event is read where Feature.EVENT_UNMAP is on.
        """
        if self._open:
            if self._pid == os.getpid():
                self._run_before_close()
            self._open = False
        # Each of these can be interrupted, and done again.
        if self._living_exports():
            self._mapping = self._mapping.without_memory()  # the views have it
        self._mapping.close()

    def __del__(self) -> None:
        if not getattr(self, "_open", False):
            return
        if self._mapping.memory.start and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self.close()

    # Checks

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError("this region is closed")

    def _span(self, offset: int, length: int | None, *, write: bool = False) -> tuple[int, int]:
        """Return (address, bytes) of a part, or raise ValueError if it is not inside."""
        self._check_open()
        if length is None:
            length = self.length - offset
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(
                f"offset {offset:#x} + {length:#x} is outside the region of {self.length:#x} bytes"
            )
        if write and not self.writable:
            raise ValueError(f"{self!r} is read-only")
        return self._mapping.start + offset, length

    def _pages(self, offset: int, length: int | None, *, write: bool = False) -> tuple[int, int]:
        at, length = self._span(offset, length, write=write)
        check_aligned("offset", offset, self.page_size)
        check_aligned("length", length, self.page_size)
        return at, length
