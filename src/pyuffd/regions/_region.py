"""`Region`: one mapped range of memory, and what can be done to it without holding the GIL."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from pyuffd import _machine, _memory
from pyuffd._arguments import check_bools, check_buffer, check_int, shown
from pyuffd._errors import PagePoisonedError, raise_errno
from pyuffd._pages import PAGE_SIZE, check_aligned, round_down
from pyuffd.regions import _create, _files
from pyuffd.regions._files import FileLike
from pyuffd.regions._mapping import Mapping, RegionKind
from pyuffd.regions._parts import Divisible, span_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from pyuffd._residency import Residency

MADV_PAGEOUT = 21  # Linux 5.4; not in the mmap module
DIGEST_PART = 256 << 10  # stays in the cache between copying and hashing


class Region(Divisible):
    """A range of mapped memory. The class methods make one; do not call the class.

    It may be registered with a `Userfaultfd`, so its methods touch it only through C calls that
    release the GIL. `memoryview()` and numpy arrays over it hold the GIL during an access. Use them
    only if the faults are resolved without the GIL of this process: by a native handler or by
    another process.

    Attributes:
        start: First address. Raises ClosedError once closed, since it may be mapped again.
        length: Bytes, a multiple of the page size; also `len(region)`.
        page_size: The unit of its faults in bytes: 4096, or the huge page size.
        kind: The kind of memory, a `RegionKind`.
        fd: The region's own descriptor of its file, or None; closed with the region.
        shared: Whether writes go to the file, where other mappings see them.
        writable: False for a read-only mapping.
        offset: Where in the file it begins, in bytes.
        was_served: Whether a Handler has served some of it, so that its content may come from
            there.

    `region[start:stop]`, in bytes, is a part of it: a region as well, of the same memory.

    After a fork the child's copy of the region belongs to the child: it can be used, and closing it
    unmaps it in the child only. `on_close` callbacks and `unlink` take effect only in the process
    that made the region.

    GIL: released in every method that touches or maps memory.  Threads: safe; while another
        thread is in a method that touches memory, close() leaves it mapped.  Blocks: a method that
        touches memory waits until the faults it causes are resolved.

    Example:
        >>> from pyuffd import Region
        >>> with Region.memfd(8192) as region, region.alias() as alias:
        ...     region.write(4096, b"seen twice")
        ...     alias.read(4096, 10)
        b'seen twice'
    """

    _failed = "closing the region failed"
    _instead = (
        "map the same memory once more with alias() or, in another process that was sent its fd,"
        " with Region.file(fd); a fork has it already"
    )

    def __init__(self, mapping: Mapping) -> None:
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"Region({shown(mapping)}): regions are made by Region.anonymous(length), memfd(),"
                " shm(), hugetlbfs(), file() or at()"
            )
        self._begin(mapping)
        self._open = True  # last: a signal handler may raise at any line above

    # Constructors

    @classmethod
    def anonymous(
        cls, length: int, *, huge_page_size: int | None = None, noreserve: bool = False
    ) -> Self:
        """Map private anonymous memory, which reads as zeros until it is written.

        Memory of 2 MiB or more is aligned to 2 MiB, so that transparent huge pages fit.

        Args:
            length: Bytes, a multiple of the page size.
            huge_page_size: Use hugetlb pages of this size in bytes instead.
            noreserve: Reserve no memory. This allows a mapping larger than the machine's memory
                and swap, which Linux otherwise refuses (vm.overcommit_memory), for a program that
                uses a part of it. If memory runs out later, an access gets SIGBUS (huge pages) or
                the kernel starts the out-of-memory killer.

        Raises:
            ValueError: a bad length, or a huge page size that this machine does not support.
            UffdOSError: ENOMEM - `hint` names the limit: vm.overcommit_memory, vm.max_map_count,
                a resource limit, or too few huge pages. For huge pages it says how many are free
                and which command adds more, and `needed_pages` and `free_pages` are set.
                EAGAIN - the process locks new mappings (mlockall), and RLIMIT_MEMLOCK is too low.

        Kernel: mmap(2). Without `noreserve` huge pages are reserved by this call, so an access
            cannot fail for lack of one.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_bools(noreserve=noreserve)
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
            shared: False maps it copy-on-write; writes do not reach the memfd.
            huge_page_size: Use hugetlb pages of this size in bytes.
            seal: Seal its size and its set of seals, so that no receiver can truncate it, which
                would make accesses to this mapping raise SIGBUS.
            noreserve: As for `anonymous`; it has an effect with shared=False and for huge pages.

        Raises:
            ValueError: as for `anonymous`.
            UffdOSError: as for `anonymous`.

        Kernel: memfd_create(2).
        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_bools(shared=shared, seal=seal, noreserve=noreserve)
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
            length: Bytes, a multiple of the page size; existing memory must be at least as long.
            reserve: As for `file`.
            unlink: Remove the name when this region is closed.

        Raises:
            ValueError: a bad name or length, or existing memory that is shorter.
            UffdOSError: ENOSPC - /dev/shm has too little space.
            OSError: the name exists and cannot be opened.

        GIL: released.  Threads: safe.  Blocks: with `reserve`, until all of it is allocated.
        """
        check_bools(reserve=reserve, unlink=unlink)
        mapping = _create.shm(name, length, reserve=reserve)
        return mapping.name.settle(unlink, cls(mapping))  # a failure before removes a new file

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
        """Create or open a file on a hugetlbfs mount; the mount determines the page size.

        Args:
            path: The file.
            length: Bytes, a multiple of that page size; an existing file must be at least as long.
            shared: False maps it copy-on-write.
            unlink: Remove the file when this region is closed.
            noreserve: As for `anonymous`: reserve no huge pages.

        Raises:
            ValueError: a bad length, a shorter file, or a path that is not on hugetlbfs.
            UffdOSError: ENOMEM - too few huge pages in the pool or on the mount; see `anonymous`.
            OSError: the file cannot be opened or created.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_bools(shared=shared, unlink=unlink, noreserve=noreserve)
        mapping = _create.hugetlbfs(path, length, shared=shared, noreserve=noreserve)
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

        A userfaultfd supports files on tmpfs and hugetlbfs, and memfds. Other files can be mapped
        but not registered. If the file is truncated later, an access raises SIGBUS; only a sealed
        memfd prevents that.

        Args:
            file: A path, a descriptor or an open file. It stays the caller's: the region uses a
                duplicate.
            length: Bytes, a multiple of the page size; up to the end of the file by default.
            offset: Where in the file to begin, a multiple of the page size.
            shared: False maps it copy-on-write.
            writable: False maps it read-only. Linux registers a shared mapping with a userfaultfd
                only if its descriptor is open for writing (EPERM).
            reserve: Allocate all of it now, so that an access cannot fail for lack of space.
                Its pages are then in the page cache, so they cause minor faults instead of missing
                faults. Without `reserve` this call fails only if the space certainly does not
                suffice.
            noreserve: As for `anonymous`; it has an effect with shared=False and for huge pages.

        Raises:
            ValueError: a bad length or offset, a file that ends before the region, not a regular
                file, or both `reserve` and `noreserve`.
            UffdPermissionError: EACCES - a shared, writable mapping of a descriptor that is
                read-only or sealed against writing, or any mapping of a write-only one.
            UffdOSError: ENOSPC - the file system has too little space: an access to the region
                would raise SIGBUS. ENOMEM - too few huge pages; see `anonymous`.
            OSError: the file cannot be opened.

        GIL: released.  Threads: safe.  Blocks: with `reserve`, until all of it is allocated.
        """
        check_bools(shared=shared, writable=writable, reserve=reserve, noreserve=noreserve)
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
        """Describe memory of this process that other code mapped; it is never unmapped from here.

        Args:
            address: First byte, aligned to the page size.
            length: Bytes, a multiple of the page size.
            page_size: The size of its pages in bytes, which is not checked. None reads it from
                /proc/self/smaps, which is slow in a process with many mappings.

        Raises:
            ValueError: not aligned, or not mapped, readable and of one kind throughout.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        return cls(_create.at(address, length, page_size))

    def alias(self) -> Self:
        """Map the same memory a second time; each mapping shows what is written to the other.

        The new region owns a duplicate of the descriptor and is writable if the descriptor is.
        It serves to resolve minor faults: write the page through the alias, then call
        `Userfaultfd.continue_` on the registered region.

        Raises:
            ValueError: private memory, or shared memory that was adopted with `at`.
            UffdOSError: ENOMEM - no room for another mapping.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        self._pages(0, None)
        return type(self)(_create.alias(self._mapping))

    # What it is

    @property
    def start(self) -> int:
        """First address."""
        if self._whole is not None or self._closer or not self._open:  # asked for very often
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
        """The kind of memory."""
        return RegionKind.ADDRESS if self._is_replaced else self._mapping.kind

    @property
    def fd(self) -> int | None:
        """The descriptor of its file, which stays the region's; None without one, or if closed."""
        return None if self.closed else self._mapping.fd

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

    def __getitem__(self, part: slice) -> Region:
        """Return a part of the region, `region[a:b]` in bytes, as a region; nothing is copied.

        The part can be used wherever a region can: to register, serve, read, scan or alias it, or
        as the content of other memory. Its offsets begin with it. It keeps the region alive.
        Closing the part ends its serving and unmaps nothing; closing the region closes its parts.
        A part may begin and end anywhere, but what works on pages requires whole pages.

        Raises:
            ValueError: a part that is empty or reaches outside the region, or a step.
            TypeError: a number: `read(offset, 1)` returns one byte.
            ClosedError: the region is closed.

        Example:
            >>> from pyuffd import Region
            >>> with Region.anonymous(8192) as region:
            ...     region[4096:].write(0, b"second page")
            ...     region.read(4096, 6)
            b'second'
        """
        self._check_open()
        found = Region.__new__(Region)
        found._become_part(self, *span_of(part, self.length))
        return found

    def __len__(self) -> int:
        return self._mapping.length

    def __repr__(self) -> str:
        it = self._mapping
        place = "closed" if self.closed else f"[{it.start:#x}, +{it.length:#x})"
        sharing = "shared" if it.shared else "private"
        what = "Region" if self._whole is None else "Region, a part,"
        return f"<{what} {place} {self.kind.value} {sharing} page_size={it.page_size:#x}>"

    # Its content

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset`; to the end by default.

        Raises:
            PagePoisonedError: the content of a page is lost; also from `write`, `fill`, `touch`
                and `digest`. Through a view or an array, an access to such a page raises SIGBUS.
            UffdOSError: EFAULT - SIGBUS for another reason, which `hint` names: a file that was
                truncated, or no free huge page.
            HandlerError: the thread runs a page source of the region's own handler, which would
                wait for itself; also from the methods above. Nothing is read.

        GIL: released.  Threads: safe.  Blocks: until the faults that it causes are resolved.
        """
        accesses = self._begin_access()
        try:
            return _memory.read(*self._access(offset, length))
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)
        finally:
            accesses.pop()

    def write(self, offset: int, data: Buffer) -> None:
        """Copy a contiguous buffer to `offset`.

        GIL: released.  Threads: safe.  Blocks: until the faults that it causes are resolved.
        """
        check_int("offset", offset)
        check_buffer("data", data)
        accesses = self._begin_access()
        try:
            at, _ = self._access(offset, memoryview(data).nbytes, write=True)
            _memory.write(at, data)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)
        finally:
            accesses.pop()

    def fill(self, value: int, offset: int = 0, length: int | None = None) -> None:
        """Set every byte, or those of a part, to `value`.

        GIL: released.  Threads: safe.  Blocks: until the faults that it causes are resolved.
        """
        if not 0 <= check_int("value", value) <= 255:
            raise ValueError(f"value {shown(value)} is not in 0..255")
        accesses = self._begin_access()
        try:
            _memory.fill(*self._access(offset, length, write=True), value)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)
        finally:
            accesses.pop()

    def touch(self, offset: int = 0, length: int | None = None, write: bool = False) -> None:
        """Access every page of a part once, so that it is present; with `write`, writable.

        With `write` a byte of each page is read and written back. If another thread writes that
        byte at the same time, its write may be lost.

        GIL: released.  Threads: safe.  Blocks: until the faults that it causes are resolved.
        """
        check_bools(write=write)
        accesses = self._begin_access()
        try:
            at, length = self._access(offset, length, write=write)
            first = round_down(at, self.page_size)
            _memory.touch(first, at + length - first, self.page_size, write=write)
        except PagePoisonedError as error:
            raise self._here(error) from self._cause_of(error)
        finally:
            accesses.pop()

    def digest(self, name: str = "sha256", offset: int = 0, length: int | None = None) -> bytes:
        """Return the digest of the content, or of a part, by a hashlib algorithm.

        GIL: released.  Threads: safe.  Blocks: until the faults that it causes are resolved.
        """
        import hashlib  # 2 ms, and rarely needed

        at, length = self._access(offset, length)
        if not isinstance(name, str):
            raise TypeError(f"name must be that of a hashlib algorithm, not {shown(name)}")
        try:
            state = hashlib.new(name)
        except ValueError as error:
            raise ValueError(f"name {name!r} is no algorithm of hashlib") from error
        if not state.digest_size:
            raise ValueError(f"name {name!r}: its digests have no length of their own")
        part = bytearray(min(length, DIGEST_PART))
        for done in range(0, length, DIGEST_PART):
            if length - done < len(part):
                del part[length - done :]
            # Copy before hashing: hashed in place, a page that is lost would raise SIGBUS.
            accesses = self._begin_access()
            try:
                self._check_open()
                _memory.read_into(part, at + done)
            except PagePoisonedError as error:
                raise self._here(error) from self._cause_of(error)
            finally:
                accesses.pop()
            state.update(part)
        return state.digest()

    def _on_loss(self, why: Callable[[int], BaseException | None]) -> None:
        """Add a function that returns why the page at an address is lost; for handlers."""
        if why not in self._why_lost:
            self._why_lost.append(why)

    def _before_access(self, check: Callable[[int, int], None]) -> None:
        """Call a function with address and length before each access; for handlers.

        It may raise, and the access then does not happen.
        """
        self._checks.append(check)

    def _forget_check(self, check: Callable[[int, int], None] | None) -> None:
        """Undo a `_before_access`; unknown functions are ignored."""
        with suppress(ValueError):
            self._checks.remove(check)  # type: ignore[arg-type]

    def _here(self, error: PagePoisonedError) -> PagePoisonedError:
        """Add to the error where in this region the page is."""
        page, start = error.start or 0, self._mapping.start
        if not start <= page < start + self.length:
            return error  # the page is in the buffer that is read or written
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

        GIL: released.  Threads: safe.  Blocks: with Feature.EVENT_REMOVE enabled, MADV_DONTNEED,
            MADV_REMOVE and MADV_FREE block until the Remove event is read.
        """
        at, length = self._pages(offset, length)
        _memory.madvise(at, length, check_int("advice", advice, 0, 1 << 31))

    def advise_thp(self, enable: bool = True, offset: int = 0, length: int | None = None) -> None:
        """Ask for transparent huge pages in a part, or refuse them.

        Raises:
            ValueError: hugetlb memory, or not whole pages.
            UffdOSError: EINVAL - a kernel without CONFIG_TRANSPARENT_HUGEPAGE.

        Kernel: MADV_HUGEPAGE, MADV_NOHUGEPAGE. For shared memory the setting
            /sys/kernel/mm/transparent_hugepage/shmem_enabled decides whether they have an effect.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_bools(enable=enable)
        if self.page_size != PAGE_SIZE:
            raise ValueError(f"{self!r} is hugetlb memory, which has no transparent huge pages")
        self.madvise(mmap.MADV_HUGEPAGE if enable else mmap.MADV_NOHUGEPAGE, offset, length)

    def pageout(self, offset: int = 0, length: int | None = None) -> None:
        """Ask the kernel to move pages to swap; `residency()` tells which pages moved.

        Pages that other processes map too stay. Pages of shared memory are RESIDENT until they have
        been written to swap. Without free swap Linux would return success and keep every page; this
        method raises an error instead.

        Raises:
            ValueError: hugetlb memory, which is never swapped; or not whole pages.
            UffdOSError: ENOSPC - no swap, or no free swap.

        Kernel: MADV_PAGEOUT; Linux 5.4.
        GIL: released.  Threads: safe.  Blocks: until the kernel has tried every page.
        """
        if self.page_size != PAGE_SIZE:
            raise ValueError(f"{self!r} is hugetlb memory, which is never swapped")
        at, length = self._pages(offset, length)
        is_on_disk = self.shared and self.fd is not None and not _files.facts(self.fd).in_memory
        if not is_on_disk and (problem := _machine.swap_problem()):
            raise_errno("MADV_PAGEOUT", errno.ENOSPC, at, length, hint=problem)
        _memory.madvise(at, length, MADV_PAGEOUT)

    def punch_hole(self, offset: int = 0, length: int | None = None) -> None:
        """Free the memory of whole pages.

        Pages of shared memory are removed from the file, and read as zeros in every mapping. Of
        private memory only this mapping's own copies are removed: anonymous memory then reads as
        zeros, and a private file mapping as the file, whose pages stay in the page cache.

        Raises:
            ValueError: offset or length not a multiple of the page size, or read-only memory.
            UffdOSError: EPERM - sealed against writing; EOPNOTSUPP - the file system does not
                support it.

        Kernel: MADV_REMOVE for shared memory (as fallocate(2) with FALLOC_FL_PUNCH_HOLE, but it
            sends a Remove event), MADV_DONTNEED for private memory.
        GIL: released.  Threads: safe.  Blocks: with Feature.EVENT_REMOVE enabled, until the Remove
            event is read.
        """
        at, length = self._pages(offset, length, write=True)
        _memory.madvise(at, length, mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED)

    def residency(self, offset: int = 0, length: int | None = None) -> Residency:
        """Return for each page whether it is a hole, swapped out, resident or mapped here.

        Raises:
            ValueError: offset or length not a multiple of the page size.

        Kernel: /proc/self/pagemap, mincore(2) and SEEK_DATA.
        GIL: released.  Threads: safe.  Blocks: no; it touches no page.
        """
        from pyuffd._residency import residency  # 5 ms

        at, length = self._pages(offset, length)
        return residency(at, length, page_size=self.page_size, fd=self.fd)

    # Checks

    def _span(self, offset: int, length: int | None, *, write: bool = False) -> tuple[int, int]:
        """Return (address, bytes) of a part; raise ValueError if it is outside the region."""
        self._check_open()
        offset = check_int("offset", offset)
        length = self.length - offset if length is None else check_int("length", length)
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(
                f"offset {offset:#x}, length {length:#x} is outside the region of"
                f" {self.length:#x} bytes"
            )
        if write and not self.writable:
            raise ValueError(f"{self!r} is read-only")
        return self._mapping.start + offset, length

    def _access(self, offset: int, length: int | None, *, write: bool = False) -> tuple[int, int]:
        """Return address and bytes of a part that will be accessed now."""
        at, length = self._span(offset, length, write=write)
        for check in self._checks.copy() if self._checks else ():
            check(at, length)
        return at, length

    def _pages(self, offset: int, length: int | None, *, write: bool = False) -> tuple[int, int]:
        at, length = self._span(offset, length, write=write)
        check_aligned("offset", offset, self.page_size)
        check_aligned("address", at, self.page_size)  # a part of a region may begin anywhere
        check_aligned("length", length, self.page_size)
        return at, length
