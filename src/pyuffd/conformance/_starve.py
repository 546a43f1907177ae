"""Run out of memory, file system pages or mappings, without an effect on other processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from pyuffd import _memory
from pyuffd._abi import Feature, MoveMode, RegisterMode
from pyuffd._events import MESSAGE_SIZE
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance._memcg import memory_group
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._raw import ioctl
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES, SMALL_PAGE
from pyuffd.testing._need import Lack, Need, needs_privilege

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # system calls
_SET_STRING, _CREATE = 1, 6
_CLOEXEC = 1
_MCL_CURRENT = 1
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
# A mapping takes 200 bytes of kernel memory, and 2 us to make.
_MOST_MAPPINGS = 1 << 18
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_PROT_NONE = 0
_TABLE = HUGE_PAGE  # a page table maps this much, at a multiple of it
_MAP_HUGETLB = 0x40000
# A fork itself needs less memory than the limit. Copying this many mappings needs more: 250 bytes
# each.
_FORK_LIMIT = 2 << 20
_FORK_MAPPINGS = 16 << 10
# How long a thread that has read the event may take to record it. The fork has waited for the read.
_AFTERWARDS_S = 0.2
_SYS_FORK, _SYS_EXIT_GROUP = 57, 231
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def small_file_system(kind: str, length: int) -> Iterator[int]:
    """Make a file in a new file system that nobody else can see; yield its descriptor.

    Args:
        kind: "tmpfs" or "hugetlbfs".
        length: The size of the file system in bytes.

    Raises:
        Lack: this user may not mount one.
    """
    needs_privilege("CAP_SYS_ADMIN").check()
    with contextlib.ExitStack() as stack:

        def opened(what: str, result: int) -> int:
            if result < 0:
                raise Lack(["mount"], f"needs a {kind} of its own; {what}: {os.strerror(-result)}")
            if what != "fsconfig":
                stack.callback(os.close, result)
            return result

        # It is never attached to a path, so it ends with its descriptor, even if we are killed.
        name, key, size = (
            ctypes.create_string_buffer(text.encode()) for text in (kind, "size", str(length))
        )
        context = opened("fsopen", syscall(_FSOPEN, ctypes.addressof(name), _CLOEXEC))
        words = (_SET_STRING, ctypes.addressof(key), ctypes.addressof(size), 0)
        opened("fsconfig", syscall(_FSCONFIG, context, *words))
        opened("fsconfig", syscall(_FSCONFIG, context, _CREATE, 0, 0, 0))
        root = opened("fsmount", syscall(_FSMOUNT, context, _CLOEXEC, 0))
        file = os.open("file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, dir_fd=root)
        stack.callback(os.close, file)
        yield file


def needs_map_limit() -> Need:
    """The limit on mappings is low enough to be reached."""

    def missing() -> tuple[list[str], str]:
        limit = int(_MAX_MAP_COUNT.read_text())
        found = f"vm.max_map_count is {limit}"
        return (["map-limit"] if limit > _MOST_MAPPINGS else []), found

    return Need(f"a limit of at most {_MOST_MAPPINGS} mappings", missing)


@contextlib.contextmanager
def _no_more_mappings() -> Iterator[None]:
    """Use up all mappings that this process may have; only for a process started for this."""
    libc = ctypes.CDLL(None, use_errno=True)
    mprotect = libc.mprotect
    mprotect.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    length = (int(_MAX_MAP_COUNT.read_text()) + 2) * SMALL_PAGE
    start = _memory.mmap(length, _PROT_NONE, _PRIVATE)
    try:
        # Each call splits off two more mappings, until the limit is reached.
        for at in range(start + SMALL_PAGE, start + length, 2 * SMALL_PAGE):
            if mprotect(at, SMALL_PAGE, mmap.PROT_READ):
                break
        if ctypes.get_errno() != errno.ENOMEM:
            raise OSError(ctypes.get_errno(), "mprotect: not the limit of mappings")
        yield
    finally:
        _memory.munmap(start, length)


def register_without_mappings() -> list[int]:
    """Register and unregister parts of mappings at the limit on mappings; for `run_child`.

    Returns:
        errno at the limit of REGISTER and UNREGISTER of one page of three and of REGISTER of a
        whole mapping, and errno of the first two below the limit.
    """
    with (
        Userfaultfd() as uffd,
        Region.anonymous(3 * SMALL_PAGE) as free,
        Region.anonymous(3 * SMALL_PAGE) as taken,
        Region.anonymous(3 * SMALL_PAGE) as whole,
    ):
        # Otherwise the kernel may merge them with adjacent mappings.
        for region in (taken, whole):
            region.madvise(mmap.MADV_DONTFORK)
        mode = int(RegisterMode.MISSING)
        uffd.register(taken, mode=RegisterMode.MISSING)

        def parts() -> list[int]:
            return [
                ioctl(uffd, "REGISTER", free.start + SMALL_PAGE, SMALL_PAGE, mode).errno,
                ioctl(uffd, "UNREGISTER", taken.start + SMALL_PAGE, SMALL_PAGE).errno,
            ]

        with _no_more_mappings():
            there = parts()
            there.append(ioctl(uffd, "REGISTER", whole.start, whole.length, mode).errno)
        return there + parts()


class _Starved:
    """A memory control group with almost no memory; only in a process started for this.

    The kernel cannot allocate what a call of this process needs, so the call fails with ENOMEM.  A
    page fault, however, waits for memory forever: meanwhile the process must not touch anything for
    the first time.
    """

    def __init__(self, limit: int = 0) -> None:
        parent, old = memory_group()
        self._group = Path(tempfile.mkdtemp(prefix="pyuffd-", dir=parent))
        self._files: list[int] = []
        # cgroup v1 can switch the OOM killer off; v2 spares processes with this score.
        if (self._group / "memory.oom_control").exists():
            (self._group / "memory.oom_control").write_text("1")
        else:
            Path("/proc/self/oom_score_adj").write_text("-1000")
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (self._group / name).exists():
                (self._group / name).write_text(str(limit))
        self._enter = self._open(self._group)
        self._leave = self._open(old)
        self._pid = str(os.getpid()).encode()
        os.write(self._leave, self._pid)  # the same call, without effect, before memory is short

    def _open(self, group: Path) -> int:
        fd = os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._files.append(fd)
        return fd

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call in the group; it must have been made before, outside."""
        os.write(self._enter, self._pid)
        try:
            return function(*args, **kwargs)
        finally:
            os.write(self._leave, self._pid)

    def close(self) -> None:
        """Remove the group."""
        for fd in self._files:
            os.close(fd)
        self._group.rmdir()


def ioctl_without_memory(name: str, memory: str, mode: int, features: int, lacks: str) -> list[int]:
    """Make an ioctl on a page while out of memory, and again with memory; for `run_child`.

    Args:
        name: COPY, ZEROPAGE, MOVE, CONTINUE, POISON or WRITEPROTECT.
        memory: The memory type.
        mode: The mode to register in.
        features: The features to enable.
        lacks: What the kernel has to allocate: "page", "page-table", or "anon-vma", its record of
            who maps private memory.

    Returns:
        errno and result field without memory, and both with it.
    """
    of = MEMORY_TYPES[memory]
    _hold_what_is_there()
    with (
        contextlib.ExitStack() as stack,
        Userfaultfd(features=Feature(features)) as uffd,
        of.make(4 * _TABLE) as region,
        of.make(4 * of.page_size) as new,
    ):
        # Otherwise the kernel may merge it with the next mapping.
        new.madvise(mmap.MADV_DONTFORK)
        source = stack.enter_context(Region.anonymous(4 * of.page_size))
        if name == "CONTINUE":
            assert region.fd is not None
            with Region.file(region.fd, region.length) as view:
                view.fill(1)
        source.fill(1)
        table = -(-region.start // _TABLE) * _TABLE
        uffd.register(table, 3 * _TABLE, mode=RegisterMode(mode))
        uffd.register(new, mode=RegisterMode(mode))

        def words(at: int, source_page: int) -> tuple[int, ...]:
            is_from = source.start + source_page * of.page_size
            middle = (is_from,) if name in ("COPY", "MOVE") else ()
            return at, *middle, of.page_size, int(name == "WRITEPROTECT")

        where = words(new.start if lacks == "anon-vma" else table + _TABLE, 2)
        fd = uffd.fileno()
        if lacks == "page":
            ioctl(fd, name, *words(table + _TABLE + of.page_size, 0))
        return _without_and_with(fd, name, words(table, 1), where)


def _hold_what_is_there() -> None:
    """Lock every page that is mapped now, privately copied, before memory runs out."""
    gc.disable()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT):
        raise OSError(ctypes.get_errno(), "mlockall")


def _without_and_with(
    fd: int, name: str, first: tuple[int, ...], where: tuple[int, ...]
) -> list[int]:
    with contextlib.closing(_Starved()) as group:
        # After this first call Python has allocated all that it needs for one.
        ioctl(fd, name, *first)
        without = group.call(ioctl, fd, name, *where)
    again = ioctl(fd, name, *where)
    return [without.errno, without.result, again.errno, again.result]


def fill_without_directory(name: str, is_huge: bool, boundary: int, holes: bool) -> list[int]:
    """Fill a page that lacks a higher-level page table, out of memory and again; for `run_child`.

    Args:
        name: COPY or MOVE.
        is_huge: Use hugetlb memory.
        boundary: How many bytes the missing table maps.
        holes: MOVE from such a place, with ALLOW_SRC_HOLES, instead of to it.

    Returns:
        The same as `ioctl_without_memory`.
    """
    _hold_what_is_there()
    page = HUGE_PAGE if is_huge else SMALL_PAGE
    flags = _PRIVATE | (_MAP_HUGETLB if is_huge else 0)
    # Four huge pages on each side of a multiple of the boundary.
    length = 3 * boundary + 8 * HUGE_PAGE
    start = _memory.mmap(length, mmap.PROT_READ | mmap.PROT_WRITE, flags)
    _memory.madvise(start, length, mmap.MADV_DONTFORK)
    try:
        edge = -(-(start + 4 * HUGE_PAGE) // boundary) * boundary
        with (
            Userfaultfd(features=Feature.MOVE if name == "MOVE" else Feature(0)) as uffd,
            Region.anonymous(4 * page) as source,
        ):
            source.madvise(mmap.MADV_DONTFORK)
            source.fill(1)
            below = edge - 4 * HUGE_PAGE
            uffd.register(below, 8 * HUGE_PAGE, mode=RegisterMode.MISSING)
            # In the same mapping, but with the table before the missing one.
            ioctl(uffd.fileno(), name, below, source.start, page)
            if holes:
                where = below + 2 * page, edge + 2 * page, page, int(MoveMode.ALLOW_SRC_HOLES)
            else:
                where = edge, source.start + 2 * page, page, 0
            first = below + page, source.start + page, page
            return _without_and_with(uffd.fileno(), name, first, where)
    finally:
        _memory.munmap(start, length)


def fork_without_memory(features: int) -> list[int]:
    """Fork with memory for only a part of the mappings; for `run_child`.

    Returns:
        errno of the fork, the number of events, and what COPY fills afterwards or -errno.
    """
    _hold_what_is_there()
    libc = ctypes.CDLL(None, use_errno=True)
    mprotect = libc.mprotect
    mprotect.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    # The registered page has the lowest address, and the kernel copies in order of addresses.
    length = 2 * _FORK_MAPPINGS * SMALL_PAGE
    start = _memory.mmap(length, _PROT_NONE, _PRIVATE)
    for at in range(start, start + length, 2 * SMALL_PAGE):
        mprotect(at, SMALL_PAGE, mmap.PROT_READ | (0 if at > start else mmap.PROT_WRITE))
    seen: list[bytes] = []
    with Userfaultfd(features=Feature(features), nonblocking=False) as uffd:
        uffd.register(start, SMALL_PAGE, mode=RegisterMode.MISSING)
        # A thread that runs meanwhile would fault on memory that the fork has shared, and wait for
        # memory forever with the GIL held. So this one sleeps in read(2).
        reader = threading.Thread(
            target=lambda: seen.append(os.read(uffd.fileno(), MESSAGE_SIZE)), daemon=True
        )
        reader.start()
        with contextlib.closing(_Starved(_FORK_LIMIT)) as group:
            pid = group.call(syscall, _SYS_FORK)
            if not pid:
                syscall(_SYS_EXIT_GROUP, 0)
        reader.join(_AFTERWARDS_S)
        source = ctypes.create_string_buffer(SMALL_PAGE)
        answer = ioctl(uffd, "COPY", start, ctypes.addressof(source), SMALL_PAGE)
        return [-pid if pid < 0 else 0, len(seen), answer.result]


def needs_kernel_accounting() -> Need:
    """Memory control groups count kernel memory, such as page tables."""

    def missing() -> tuple[list[str], str]:
        is_off = "nokmem" in Path("/proc/cmdline").read_text()
        return (["kmem"] if is_off else []), "the kernel was started with cgroup.memory=nokmem"

    return Need("page tables that are accounted for", missing)
