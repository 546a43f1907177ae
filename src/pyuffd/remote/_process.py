"""`Process`: mappings, memory, page table and threads of a running process."""

from __future__ import annotations

import errno
import os
import select
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pyuffd import _remote_calls as calls
from pyuffd._abi import Feature
from pyuffd._arguments import (
    check_bools,
    check_buffer,
    check_descriptor,
    check_int,
    check_pid,
    new_buffer,
    shown,
)
from pyuffd._closing import Closing
from pyuffd._errors import (
    ClosedError,
    ProcessGoneError,
    UffdOSError,
    raise_errno,
    raise_if_short,
)
from pyuffd._owned import Descriptor
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE, RangeLike, resolve_range
from pyuffd._polling import Poll
from pyuffd.pagemap import Pagemap, PageRanges, check_proc
from pyuffd.regions import Region
from pyuffd.remote._mappings import (
    Kinds,
    Mappings,
    query_mappings,
    read_mappings,
    with_details,
)
from pyuffd.remote._threads import Thread, threads_of
from pyuffd.remote._through import has_memory, thread_with_memory, why_no_memory

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd._remote_calls import Attached
    from pyuffd._uffd import Userfaultfd
    from pyuffd.remote._stop import Stop

_T = TypeVar("_T")
_PTRACE_HINT = "looking at another user's process needs CAP_SYS_PTRACE"


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of `Process.copy`.

    Attributes:
        bytes: Bytes in place, those of lost pages included.
        lost: Pages that could not be read, in whose place are zeros: unmapped since, without
            permission to read, poisoned, or behind the end of their file.
    """

    bytes: int
    lost: PageRanges


class Process(Closing):
    """Look at a running process from outside, without its cooperation.

    The object belongs to one process and to the memory that it has now: after its exit, or an
    execve(2), every call raises ProcessGoneError, also if another process has its id by then.

    Args:
        pid: The process, in this process's PID namespace; any of its threads will do.

    Attributes:
        pid: Its id.
        pagemap: Its page table, a `Pagemap`, with PAGEMAP_SCAN.

    Raises:
        ValueError: a `pid` below 1.
        ProcessGoneError: ESRCH - no such process; a kernel thread, or one that is exiting: it has
            no memory.
        UffdPermissionError: EACCES, EPERM - another user's process, without CAP_SYS_PTRACE.

    Kernel: pidfd_open(2), proc_pid_maps(5), proc_pid_pagemap(5).
    GIL: released.  Threads: safe, except for close().  Blocks: no, unless a method says so.

    Example:
        >>> import os
        >>> from pyuffd import Process
        >>> with Process(os.getpid()) as process:
        ...     stack = next(m for m in process.mappings() if m.path == "[stack]")
        ...     len(process.read(stack.end - 4096, 4096))
        4096
    """

    pid: int
    _attached: Attached

    _what = "process"
    _instead = "make another with Process(pid)"

    def __init__(self, pid: int) -> None:
        check_pid("pid", pid)
        self.pid = pid = check_int("pid", pid)
        self._maker = os.getpid()
        self._maps = Descriptor()
        check_proc()
        try:
            descriptor = Descriptor.of_process(pid)
        except OSError as error:
            code = error.errno or errno.ESRCH
            if code != errno.EINVAL and code != errno.ENOENT:  # Linux 6.9 says ENOENT for a thread
                raise_errno(f"pidfd_open {pid}", code)
            self.pid = pid = _leader(pid)
            descriptor = Descriptor.of_process(pid)
        self._thread = thread_with_memory(pid)
        with descriptor:
            try:
                self.pagemap: Pagemap = Pagemap(self._thread)
            except ProcessGoneError as error:
                raise error.with_hint(why_no_memory(pid)) from None
            try:
                self._open_maps()
                self._pidfd = descriptor.moved()
                self.mappings()  # a process without memory is refused
                self.check()
            except BaseException:
                self.close()
                raise

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._maps.is_open

    def _check_usable(self) -> None:
        self.fileno()

    def fileno(self) -> int:
        """Return the pidfd, which stays this object's; it is readable once the process has ended.

        Raises:
            ClosedError: closed, or called in a fork of the process that made the object.
        """
        if self.closed:
            raise ClosedError("this process object is closed")
        if self._maker != os.getpid():
            raise ClosedError(f"this object belongs to process {self._maker}, not to its fork")
        return self._pidfd.number

    @property
    def memory_tid(self) -> int:
        """The thread by whose id its memory is reached: `pid` until the first thread has ended."""
        if not has_memory(self.pid, self._thread):
            self._thread = thread_with_memory(self.pid)
        return self._thread

    def _open_maps(self) -> None:
        self._opened_by = self.memory_tid
        self._maps.close()
        self._maps = _open(f"/proc/{self._opened_by}/maps")
        self._kinds = Kinds(self._opened_by, self._maps.number)

    def close(self) -> None:
        """Close the descriptors; the process is not touched. A second call does nothing.

        GIL: released.  Threads: when no other thread uses the object.  Blocks: no.
        """
        self._maps.close()
        self.pagemap.close()
        if hasattr(self, "_pidfd"):
            self._pidfd.close()

    def __del__(self) -> None:
        if hasattr(self, "_pidfd") and not self.closed and self._maker == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Process {self.pid}{' closed' if self.closed else ''}>"

    # Whether it is the same

    @property
    def is_running(self) -> bool:
        """Whether it still is the same process with the same memory: no exit, no execve(2)."""
        poll = Poll()
        poll.register(self.fileno(), select.POLLIN)
        if poll.poll(0):
            return False
        try:
            return bool(calls.is_alive(self.pagemap.fileno()))
        except UffdOSError:
            return False

    def check(self) -> None:
        """Raise ProcessGoneError unless it still is the same process with the same memory.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        if not self.is_running:
            raise_errno(
                f"process {self.pid}",
                errno.ESRCH,
                hint="it has exited, or has replaced its memory (execve)",
            )

    # Mappings and threads

    def mappings(self, *, details: bool = False) -> Mappings:
        """Read its mappings.

        Args:
            details: Read the VmFlags too, from smaps: the kernel then walks the page tables of the
                whole process, which needs milliseconds per GiB.

        Returns:
            All mappings, ascending and disjoint. The kernel reads them piece by piece: to get the
            state of one moment, stop the process.

        Raises:
            ProcessGoneError: ESRCH - it has exited, or replaced its memory.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_bools(details=details)
        found = self._read(lambda: read_mappings(self._maps.number, self.pid, self._kinds))
        return with_details(found, self.memory_tid) if details else found

    def _mappings_in(self, spans: memoryview) -> Mappings:
        """Read its mappings: those that overlap packed ranges, or all if that is quicker."""
        found = self._read(lambda: query_mappings(self._maps.number, self.pid, self._kinds, spans))
        return self.mappings() if found is None else found

    def _read(self, read: Callable[[], _T]) -> _T:
        self.fileno()
        try:
            return read()
        except ProcessGoneError:
            # The kernel reads them by the thread for which the file was opened, which has ended.
            if self.memory_tid == self._opened_by:
                raise
            self._open_maps()
            return read()

    def threads(self) -> list[Thread]:
        """Return its threads, in the kernel's order.

        Raises:
            ProcessGoneError: ESRCH - it has exited, or replaced its memory.

        GIL: released.  Threads: safe.  Blocks: no.
        """
        found = list(threads_of(self.pid))
        self.check()
        return found

    # Memory

    def read(self, start: int, length: int) -> bytes:
        """Return memory as bytes; for more than a little use `copy`.

        Raises:
            ValueError: a bad range.
            MemoryError: there is no memory for so many bytes here.
            UffdOSError: EFAULT - a page of the range cannot be read; `start` is its address.
            ProcessGoneError: ESRCH - it has exited, or replaced its memory.

        GIL: released.  Threads: safe.  Blocks: as `copy`.
        """
        _check_bytes(start, length)
        target = new_buffer(length, f"the memory of process {self.pid}")
        if length:
            copied = self.copy(_packed(start, start + length), target)
            if len(copied.lost):
                raise_errno("process_vm_readv", errno.EFAULT, copied.lost[0].start, PAGE_SIZE)
        return bytes(target)

    def copy(
        self,
        ranges: PageRanges | RangeLike,
        target: Buffer | Region | int | object,
        *,
        base: int | None = None,
        offset: int = 0,
    ) -> Copied:
        """Copy memory to a buffer, a region or a file, without a Python object on the way.

        Args:
            ranges: What to copy: a round's `written`, one mapping, or any range object.
            target: A writable buffer, a `Region` of this process, or a file: a descriptor or an
                open file that is written with pwrite(2).
            base: None packs the ranges, one behind the other. An address puts each byte at its
                distance from it: a mapping's `start` makes an image of that mapping.
            offset: Where in the target to begin, in bytes.

        Returns:
            How much was copied, and what could not be read.

        Raises:
            ValueError: the target is too small for the ranges, or a range begins below `base`.
            ProcessGoneError: ESRCH - it has exited, or replaced its memory; the copy is
                useless.
            UffdOSError: ENOSPC, EIO - writing the file failed.

        Kernel: process_vm_readv(2), 512 ranges a call.
        GIL: released.  Threads: safe.  Blocks: while pages are read from swap, or their faults are
            resolved by a handler.
        """
        packed = ranges if isinstance(ranges, PageRanges) else _packed(*_span(ranges))
        view = packed.memoryview()
        if base is not None:
            check_int("base", base, 0, ADDRESS_LIMIT - 1)
            if len(packed) and packed[0].start < base:
                raise ValueError(f"range {packed[0].start:#x} begins below base {base:#x}")
        check_int("offset", offset, 0)
        self.fileno()
        if isinstance(target, Region):
            start, size = _place(target, offset)
            self._check_fits(packed, size, base)
            lost, done = calls.read_ranges_to(self.memory_tid, view, start, size, base)
        elif isinstance(target, int) or hasattr(target, "fileno"):
            fd = check_descriptor("target", target)
            lost, done = calls.read_ranges_to_file(self.memory_tid, view, fd, offset, base)
        else:
            check_buffer("target", target)
            with memoryview(target) as buffer, buffer.cast("B") as all_bytes:  # type: ignore[arg-type]
                if all_bytes.readonly:
                    raise ValueError("target is a read-only buffer")
                part = all_bytes[offset:]
                self._check_fits(packed, len(part), base)
                lost, done = calls.read_ranges(self.memory_tid, view, part, base)
                part.release()
        self.check()  # afterwards: the pid and the memory were the same all the time
        return Copied(done, PageRanges(lost))

    # Stopping and attaching

    def stopped(self, timeout_s: float = 1.0) -> Stop:
        """Stop all threads until the end of a `with` block, without a signal that others see.

        Threads made meanwhile are stopped too, until the list is stable, and so are processes that
        share the memory (vfork, CLONE_VM). However the block ends, by SIGKILL of this process too,
        they continue where they were: the kernel detaches what a dead tracer traced. One case is
        left: if a signal handler raises just as the block ends, they continue when the last
        reference to the returned object is gone.

        Args:
            timeout_s: When to give up; then everything runs again.

        Returns:
            A context manager with `threads`, `seconds` and `pids`.

        Raises:
            ValueError: this process itself, or one that shares its memory.
            StopTimeoutError: ETIMEDOUT - a thread waits in the kernel, uninterruptibly (state D).
            UffdPermissionError: EPERM - a debugger traces it, or ptrace is refused.
            ProcessGoneError: ESRCH - it has exited, or replaced its memory.

        Kernel: PTRACE_SEIZE and PTRACE_INTERRUPT of ptrace(2). System calls are restarted, with the
            time that remains; one with a time limit that signal(7) lists as never restarted
            (epoll_wait) returns EINTR.
        GIL: released.  Threads: one at a time.  Blocks: up to `timeout_s`.
        """
        from pyuffd.remote import _stop

        self.fileno()
        return _stop.stop(self, timeout_s)

    def attach(
        self,
        features: Feature = Feature(0),  # noqa: B008 - an immutable flag
        *,
        user_mode_only: bool = False,
        timeout_s: float = 2.0,
    ) -> Userfaultfd:
        """Return a userfaultfd of this process's memory, opened by a system call made in it.

        One thread is stopped for less than 1 ms on an idle machine; no code is changed, and
        the table of descriptors is not touched. Closing the userfaultfd, or the end of this
        process, undoes all registrations.

        Args:
            features: Feature bits to enable.
            user_mode_only: Deliver faults of user code only; with Feature.WP_ASYNC.
            timeout_s: When to give up; the target runs on as before.

        Returns:
            An adopted `Userfaultfd` whose `owner_pid` is this process.

        Raises:
            ValueError: this process itself, or `user_mode_only` without Feature.WP_ASYNC.
            UnsupportedFeatureError: features that this kernel lacks.
            RangeBusyError: EBUSY - a debugger traces it.
            UffdPermissionError: EPERM - ptrace is refused; EACCES and EPERM - the target may not
                open a userfaultfd, and this process may not open /dev/userfaultfd for it.
            UffdOSError: ENOEXEC - not a 64-bit program; EOPNOTSUPP - a shadow stack, code without a
                return from signal handlers, or a kernel before Linux 6.9; ETIMEDOUT - its threads
                cannot be stopped, or get no CPU: its cgroup is frozen, or the machine is busy.
            ProcessGoneError: ESRCH - it has exited, or replaced its memory.

        Kernel: ptrace(2), pidfd_getfd(2). A seccomp filter is suspended meanwhile, which needs
            CAP_SYS_ADMIN. docs/tracking.md says how it works, and what a SIGKILL leaves.
        GIL: released.  Threads: one at a time.  Blocks: up to `timeout_s`.
        """
        from pyuffd.remote import _attach

        check_bools(user_mode_only=user_mode_only)
        self.fileno()
        uffd, self._attached = _attach.attach(
            self, features, user_mode_only=user_mode_only, limit_s=timeout_s
        )
        return uffd

    def _check_fits(self, ranges: PageRanges, size: int, base: int | None) -> None:
        wanted = ranges.bytes
        if base is not None and len(ranges):
            wanted = ranges[-1].end - base
        if wanted > size:
            raise ValueError(f"the target has {size:#x} bytes, the ranges need {wanted:#x}")


def _place(region: Region, offset: int) -> tuple[int, int]:
    if not region.writable:
        raise ValueError(f"target {shown(region)} is read-only")
    if offset > region.length:
        raise ValueError(f"offset {offset:#x} is behind the region's end, {region.length:#x}")
    return region.start + offset, region.length - offset


def _span(ranges: RangeLike) -> tuple[int, int]:
    start, length = resolve_range(ranges, None, name="ranges")
    _check_bytes(start, length)
    return start, start + length


def _check_bytes(start: int, length: int) -> None:
    check_int("start", start, 0)
    check_int("length", length, 0)
    if start + length > ADDRESS_LIMIT:
        raise ValueError(f"range {start:#x} + {length:#x} crosses the end of the address space")


def _packed(start: int, end: int) -> PageRanges:
    return PageRanges(memoryview(struct.pack("=3Q", start, end, 0)).cast("Q"))


def _open(path: str) -> Descriptor:
    try:
        return Descriptor.open(path, os.O_RDONLY)
    except OSError as error:
        code = error.errno or errno.EIO
        if code == errno.ENOENT:
            code = errno.ESRCH
        raise_errno(f"open {path}", code, hint="" if code == errno.ESRCH else _PTRACE_HINT)


def _leader(tid: int) -> int:
    """Return the process of a thread."""
    try:
        text = Path(f"/proc/{tid}/status").read_text()
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        raise_errno(f"process {tid}", errno.ESRCH)
    return int(text.split("\nTgid:", 1)[1].split(None, 1)[0])
