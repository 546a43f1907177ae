"""Errors of the ioctls tell their cause: class, errno, and the text of the hint."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    CopyMode,
    Feature,
    Handler,
    LayoutChangedError,
    PartialResolveError,
    RangeBusyError,
    Region,
    RegisterMode,
    UffdOSError,
    UffdPermissionError,
    Userfaultfd,
    ZeroSource,
    _diagnose,
    _memory,
)
from pyuffd.testing import needs_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE
from tests._child import run_child
from tests._memory import PAGE

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
DATA = bytes(PAGE)
MAP_FIXED = 0x10


def libc(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    assert function(ctypes.c_void_p(args[0]), *args[1:]) == 0


class Memory:
    """Memory of several kinds, and the userfaultfd with which some of it is registered."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.uffd = stack.enter_context(Userfaultfd())
        self.anon = stack.enter_context(Region.anonymous(4 * PAGE))  # registered
        self.shmem = stack.enter_context(Region.memfd(4 * PAGE))  # registered
        self.other = stack.enter_context(Region.anonymous(4 * PAGE))
        for region in (self.anon, self.shmem):
            self.uffd.register(region)

    def hugetlb(self) -> Region:
        region = self._stack.enter_context(
            Region.anonymous(2 * HUGE_PAGE, huge_page_size=HUGE_PAGE, noreserve=True)
        )
        self.uffd.register(region)
        return region

    def file(self) -> int:
        """Return the address of two pages of an ordinary file."""
        with tempfile.TemporaryFile(dir="/var/tmp") as file:
            file.write(bytes(2 * PAGE))
            file.flush()
            start = _memory.mmap(2 * PAGE, 3, mmap.MAP_SHARED, file.fileno())
        self._stack.callback(_memory.munmap, start, 2 * PAGE)
        return start

    def read_only(self) -> Region:
        fd = os.memfd_create("ro")
        self._stack.callback(os.close, fd)
        os.ftruncate(fd, PAGE)
        ro = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        self._stack.callback(os.close, ro)
        return self._stack.enter_context(Region.file(ro, writable=False))

    def with_a_hole(self) -> Region:
        region = self._stack.enter_context(Region.anonymous(3 * PAGE))
        self.uffd.register(region)
        libc("munmap", region.start + PAGE, PAGE)
        self._stack.callback(_memory.munmap, region.start + PAGE, PAGE)
        return region

    def in_two(self) -> Region:
        region = self._stack.enter_context(Region.anonymous(2 * PAGE))
        self.uffd.register(region)
        libc("mprotect", region.start, PAGE, 1)
        return region

    def beside_a_file(self) -> tuple[int, int]:
        """Return a range whose first mapping is valid and whose second is not."""
        region = self._stack.enter_context(Region.anonymous(2 * PAGE))
        with tempfile.TemporaryFile(dir="/var/tmp") as file:
            file.write(bytes(PAGE))
            file.flush()
            flags = mmap.MAP_PRIVATE | MAP_FIXED
            _memory.mmap(PAGE, 1, flags, file.fileno(), 0, region.start + PAGE)
        return region.start, 2 * PAGE

    def of_another(self) -> Region:
        region = self._stack.enter_context(Region.anonymous(PAGE))
        self._stack.enter_context(Userfaultfd()).register(region)
        return region


Call = Callable[[Memory], Any]

# what, the call, errno, class, what the hint names
TABLE: list[tuple[str, Call, int, type[UffdOSError], str]] = [
    ("register-file", lambda m: m.uffd.register(m.file(), PAGE), errno.EINVAL, UffdOSError,
     "ordinary file"),
    ("register-file-wp", lambda m: m.uffd.register(m.file(), PAGE, mode=WP), errno.EINVAL,
     UffdOSError, "WP_ASYNC"),
    ("register-file-second", lambda m: m.uffd.register(*m.beside_a_file()), errno.EINVAL,
     UffdOSError, "ordinary file"),
    ("register-minor-anon", lambda m: m.uffd.register(m.other, mode=MINOR), errno.EINVAL,
     UffdOSError, "MINOR"),
    ("register-unmapped", lambda m: m.uffd.register(0x10000, PAGE), errno.EINVAL, UffdOSError,
     "nothing is mapped at 0x10000"),
    ("register-read-only", lambda m: m.uffd.register(m.read_only()), errno.EPERM,
     UffdPermissionError, "O_RDWR"),
    ("register-busy", lambda m: m.uffd.register(m.of_another()), errno.EBUSY, RangeBusyError,
     "another userfaultfd"),
    ("register-mode", lambda m: m.uffd.register(m.other, mode=RegisterMode(1 << 20)),
     errno.EINVAL, UffdOSError, "mode 0x100000"),
    ("unregister-other", lambda m: m.uffd.unregister(m.of_another()), errno.EINVAL, UffdOSError,
     "another userfaultfd"),
    ("copy-wp", lambda m: m.uffd.copy(m.anon.start, DATA, mode=CopyMode.WP), errno.EINVAL,
     UffdOSError, "RegisterMode.WP"),
    ("fill-wp", lambda m: m.uffd.fill_copy(m.anon.start, DATA, mode=CopyMode.WP), errno.EINVAL,
     UffdOSError, "RegisterMode.WP"),
    ("copy-unregistered", lambda m: m.uffd.copy(m.other.start, DATA), errno.ENOENT,
     LayoutChangedError, "not registered"),
    ("copy-unmapped", lambda m: m.uffd.copy(0x10000, DATA), errno.ENOENT, LayoutChangedError,
     "nothing is mapped at 0x10000"),
    ("copy-from-nowhere", lambda m: m.uffd.copy(m.anon.start, 0x10000, PAGE), errno.EFAULT,
     UffdOSError, "nothing is mapped at 0x10000"),
    ("copy-two", lambda m: m.uffd.copy(m.in_two().start, 2 * DATA), errno.ENOENT,
     LayoutChangedError, "spans 2 mappings"),
    ("copy-hole", lambda m: m.uffd.copy(m.with_a_hole().start, 3 * DATA), errno.ENOENT,
     LayoutChangedError, "nothing is mapped"),
    ("zeropage-unregistered", lambda m: m.uffd.zeropage(m.other), errno.ENOENT,
     LayoutChangedError, "not registered"),
    ("poison-unregistered", lambda m: m.uffd.poison(m.other), errno.ENOENT, LayoutChangedError,
     "not registered"),
    ("writeprotect", lambda m: m.uffd.writeprotect(m.anon), errno.ENOENT, LayoutChangedError,
     "RegisterMode.WP"),
    ("writeprotect-hole", lambda m: m.uffd.writeprotect(m.with_a_hole()), errno.ENOENT,
     LayoutChangedError, "nothing is mapped"),
    ("continue-empty", lambda m: m.uffd.continue_(m.shmem), errno.EFAULT, UffdOSError,
     "page cache"),
    ("continue-anon", lambda m: m.uffd.continue_(m.anon), errno.EINVAL, UffdOSError,
     "page cache"),
    ("move-shmem", lambda m: m.uffd.move(m.shmem.start, m.other.start, PAGE), errno.EINVAL,
     UffdOSError, "not anonymous"),
    ("move-unregistered", lambda m: m.uffd.move(m.other.start, m.anon.start, PAGE),
     errno.EINVAL, UffdOSError, "not registered"),
    ("move-hole", lambda m: m.uffd.move(m.anon.start, m.other.start, PAGE), errno.ENOENT,
     LayoutChangedError, "ALLOW_SRC_HOLES"),
]  # fmt: skip
HUGE: list[tuple[str, Callable[[Memory, Region], Any], str]] = [
    ("register", lambda m, h: m.uffd.register(h.start + PAGE, PAGE), "0x200000"),
    ("register-length", lambda m, h: m.uffd.register(h.start, PAGE), "0x200000"),
    ("unregister", lambda m, h: m.uffd.unregister(h.start, PAGE), "0x200000"),
    ("copy", lambda m, h: m.uffd.copy(h.start, DATA), "0x200000"),
    ("poison", lambda m, h: m.uffd.poison(h.start, PAGE), "0x200000"),
    ("zeropage", lambda m, h: m.uffd.zeropage(h), "huge pages"),
]


def refused(call: Callable[[], Any]) -> UffdOSError:
    with pytest.raises(UffdOSError) as caught:
        call()
    return caught.value


def one_row(name: str) -> None:
    _, call, code, cls, named = next(row for row in TABLE if row[0] == name)
    with contextlib.ExitStack() as stack:
        memory = Memory(stack)
        error = refused(lambda: call(memory))
    assert (error.errno, type(error)) == (code, cls)
    assert named in error.hint
    assert error.hint in str(error)


@pytest.mark.parametrize("name", [row[0] for row in TABLE])
def test_cause(name: str) -> None:
    run_child(one_row, name)


def one_huge_row(name: str) -> None:
    _, call, named = next(row for row in HUGE if row[0] == name)
    with contextlib.ExitStack() as stack:
        memory = Memory(stack)
        region = memory.hugetlb()
        error = refused(lambda: call(memory, region))
    assert error.errno == errno.EINVAL
    assert named in error.hint


@needs_hugepages(2)
@pytest.mark.parametrize("name", [row[0] for row in HUGE])
def test_cause_with_huge_pages(name: str) -> None:
    run_child(one_huge_row, name)


def through_serve() -> None:
    with contextlib.ExitStack() as stack:
        memory = Memory(stack)
        start = memory.file()
        region = stack.enter_context(Region.at(start, PAGE))
        handler = stack.enter_context(Handler(stack.enter_context(Userfaultfd())))
        assert "ordinary file" in refused(lambda: handler.serve(region, ZeroSource())).hint


def test_serve_says_it_too() -> None:
    run_child(through_serve)


def too_many_mappings() -> None:
    limit = int(MAX_MAP_COUNT.read_text())
    with contextlib.ExitStack() as stack:
        memory = Memory(stack)
        cut = stack.enter_context(Region.anonymous((limit + 10) * PAGE))
        mprotect = ctypes.CDLL(None).mprotect
        page = 0
        while mprotect(ctypes.c_void_p(cut.start + page * PAGE), PAGE, 1) == 0:
            page += 2
        error = refused(lambda: memory.uffd.register(memory.other.start + PAGE, PAGE))
        assert error.errno == errno.ENOMEM
        assert "vm.max_map_count" in error.hint
        assert mprotect(ctypes.c_void_p(cut.start), cut.length, 3) == 0


def test_too_many_mappings() -> None:
    if int(MAX_MAP_COUNT.read_text()) > 1 << 18:
        pytest.skip("vm.max_map_count is too high to be met in a test")
    run_child(too_many_mappings, budget_s=30)


def test_what_cannot_be_looked_at_is_no_error() -> None:
    plain = UffdOSError(errno.EINVAL, "UFFDIO_REGISTER", 0x1000, 0x1000, mode=1)
    for pid in (None, 1 << 30):
        asked = _diagnose.Asked(plain.op, 0x1000, 0x1000, pid)
        assert _diagnose.explained(plain, asked) is plain


def test_an_unread_event_is_named() -> None:
    error = PartialResolveError(errno.EAGAIN, "UFFDIO_COPY", 0x1000, 0x1000, completed=0)
    asked = _diagnose.Asked(error.op, 0x1000, 0x1000, None, features=Feature.EVENT_FORK)
    explained = _diagnose.explained(error, asked)
    assert type(explained) is PartialResolveError
    assert explained.completed == 0
    assert "read_events" in explained.hint
    partial = PartialResolveError(errno.EAGAIN, "UFFDIO_COPY", 0x1000, 0x1000, completed=PAGE)
    assert _diagnose.explained(partial, asked) is partial
