"""Processes that end while the kernel works for them, and faults of a process that ends (L5).

A process that is killed inside an ioctl leaves behind what it has filled so far, and an event that
nobody has read goes with the process that sent it.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd._abi import Feature, PageBit, RegisterMode
from pyuffd._events import MESSAGE_SIZE
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Child, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._types import ALL, ANY, SMALL, missing_features, poison_features
from pyuffd.conformance._wp import MISSING_READ
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

SYS_READ, SYS_SIGPROCMASK, SYS_IOCTL, SYS_FORK, SYS_CHDIR = 0, 14, 16, 57, 80
SYS_SET_TID_ADDRESS, SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 218, 434, 438
SIG_SETMASK, MASK_BYTES = 2, 8
FORK = Feature.EVENT_FORK
MISSING = RegisterMode.MISSING
VALUE = 0x55
ANON_SHARED = "2"  # core(5): coredump_filter
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
MANY = {False: 4096, True: 8}  # pages, small and huge: to fill them takes some milliseconds


def _with_fork(memory: MemoryType) -> Feature:
    return missing_features(memory) | FORK


def _wait(ctx: Context, what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        if time.monotonic() > deadline:
            ctx.fail(what, f"not within {WAIT_S:g} s", "sooner")
        os.sched_yield()


def _hand_over(ctx: Context, child: Child) -> int:
    """Give a child the userfaultfd, which it closed after the fork; return its number there."""
    pidfd = child.syscall(SYS_PIDFD_OPEN, os.getpid(), 0)
    fd = child.syscall(SYS_PIDFD_GETFD, pidfd, ctx.uffd.fileno(), 0) if pidfd >= 0 else pidfd
    if fd < 0:
        ctx.lack("pidfd_getfd", f"pidfd_getfd: {errno.errorcode.get(-fd, fd)}")
    return fd


# Killed in the middle of an ioctl


@dataclass(frozen=True)
class Fill:
    """An ioctl that fills many pages; `source` says whether it reads a source."""

    name: str
    memory: tuple[str, ...]
    source: bool
    features: Callable[[MemoryType], Feature]


FILLS = (
    Fill("COPY", ALL, True, missing_features),
    Fill("ZEROPAGE", SMALL, False, missing_features),
    Fill("POISON", SMALL, False, poison_features),
)


def _filled(region: Region, pages: int) -> list[bool]:
    """Return which of the first pages are present or poisoned."""
    step = region.page_size // SMALL_PAGE
    with Pagemap() as pagemap:
        entries = list(pagemap.read(region.start, pages * region.page_size))
    return [bool(entry & int(PageBit.PRESENT | PageBit.SWAP)) for entry in entries[::step]]


def _add_killed(fill: Fill) -> None:
    def run(ctx: Context) -> None:
        pages = MANY[ctx.memory.is_hugetlb]
        region = ctx.make(pages)
        argument, source = ctx.make(1, "anon"), ctx.make(1)
        words: tuple[int, ...] = (region.start, region.length, 0, 0)
        if fill.source:
            source = ctx.make(region.length // SMALL_PAGE, "anon")
            source.fill(VALUE)
            words = (region.start, source.start, region.length, 0, 0)
        ctx.register(region, MISSING)
        argument.write(0, struct.pack(f"={len(words)}Q", *words))
        child = ctx.fork()
        call = (SYS_IOCTL, _hand_over(ctx, child), _raw.request(fill.name), argument.start)
        filling = ctx.start(child.syscall, *call)
        _wait(ctx, "the first page", lambda: _filled(region, 1)[0])
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(OSError):  # the child is gone, unless it had finished
            filling.result()
        filled = _filled(region, pages)
        count = sum(filled)
        ctx.expect("which of the first pages are filled", filled[:count], [True] * count)
        if fill.source:
            same = ctx.silently(ctx.read, region.start, count * ctx.page)
            ctx.expect(
                "whether the filled pages have their content",
                same == bytes([VALUE]) * count * ctx.page,
                True,
            )
        # The killed call has released its locks.
        if count < pages:
            copied = ctx.uffd.copy(region.start + count * ctx.page, bytes(ctx.page))
            ctx.expect("bytes that COPY fills after the kill", copied, ctx.page)
        ctx.expect_quiet()

    case(
        f"UFFDIO_{fill.name}.ok.killed",
        origin="mm/userfaultfd.c: mfill_atomic, EINTR",
        memory=fill.memory,
        features=fill.features,
        summary="A process killed during the call leaves the first pages filled and whole, and the"
        " rest missing",
    )(run)


for _fill in FILLS:
    _add_killed(_fill)


@case(
    "UFFDIO_COPY.ok.signal-pending",
    origin="mm/userfaultfd.c: mfill_atomic, fatal_signal_pending",
    features=_with_fork,
)
def signal_pending(ctx: Context) -> None:
    """A COPY of several pages is not cut short by a signal that is not fatal."""
    pages = 3
    region = ctx.make(pages)
    argument = ctx.make(1, "anon")
    # The child reads the source, whose first small page is missing in the child.
    source = ctx.make(region.length // SMALL_PAGE, "anon")
    source.advise_thp(False)
    words = (region.start, source.start, region.length, 0, 0)
    argument.write(0, struct.pack("=5Q", *words))
    ctx.register(region, MISSING)
    ctx.uffd.register(source, mode=MISSING)
    child = ctx.fork()
    own = child.uffd
    assert own is not None
    rest = source.length - SMALL_PAGE
    own.copy(source.start + SMALL_PAGE, bytes([VALUE]) * rest)
    call = (SYS_IOCTL, _hand_over(ctx, child), _raw.request("COPY"), argument.start)
    copying = ctx.start(child.syscall, *call)
    ctx.expect_fault(MISSING_READ, source.start, own)
    os.kill(child.pid, signal.SIGSTOP)
    # The signal ends the wait for the source, and the page faults again until it is filled.
    ctx.expect_fault(MISSING_READ, source.start, own)
    own.copy(source.start, bytes([VALUE]) * SMALL_PAGE)
    _wait(ctx, "the child's stop", lambda: _state(child.pid) == "T")
    os.kill(child.pid, signal.SIGCONT)
    ctx.expect("result of the child's COPY", copying.result(), 0)
    same = ctx.silently(ctx.read, region.start, region.length)
    ctx.expect("whether all pages have their content", same == bytes([VALUE]) * region.length, True)


# A fork whose event is not read


@case("fork.ok.killed-unread", origin="fs/userfaultfd.c: release_new_ctx", features=_with_fork)
def killed_unread(ctx: Context) -> None:
    """A process killed while its Fork event is unread takes the event with it."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    ctx.start(_forking, child)
    ctx.wait_readable(child.uffd)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    ctx.expect_quiet(child.uffd)
    ctx.expect_errno(errno.EAGAIN, os.read, child.uffd.fileno(), MESSAGE_SIZE)
    # The layout is no longer changing, so the errno is that of an ended process, and not EAGAIN.
    words = region.start, ctx.page, 0, 0
    code = ctx.until(errno.ESRCH, lambda: ctx.ioctl("ZEROPAGE", *words, uffd=child.uffd).errno)
    ctx.expect("errno of ZEROPAGE", code, errno.ESRCH)


def _forking(child: Child) -> int:
    with contextlib.suppress(OSError):  # the child is gone
        return child.syscall(SYS_FORK)
    return 0


# A read that is interrupted


@case("read.ok.stopped-and-continued", origin="fs/userfaultfd.c: ERESTARTSYS", memory=ANY)
def stopped(ctx: Context) -> None:
    """A blocking read goes on waiting after its process is stopped and continued."""
    region, buffer = ctx.make(1), ctx.make(1, "shmem")
    ctx.open()
    child = ctx.fork_only()
    ctx.register(region, MISSING)
    os.set_blocking(ctx.uffd.fileno(), True)
    call = (SYS_READ, _hand_over(ctx, child), buffer.start, MESSAGE_SIZE)
    reading = ctx.start(child.syscall, *call)
    _wait(ctx, "the child's sleep", lambda: _state(child.pid) == "S")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    ctx.expect("whether the read returned after SIGSTOP", reading.done, False)
    os.kill(child.pid, signal.SIGCONT)
    access = ctx.start(ctx.read, region.start)
    ctx.expect("bytes read", reading.result(), MESSAGE_SIZE)
    event, flags, address = struct.unpack_from("=B7xQQ", buffer.read(0, MESSAGE_SIZE))
    ctx.expect("the message", (event, flags, address), (0x12, MISSING_READ, region.start))
    os.set_blocking(ctx.uffd.fileno(), False)
    ctx.uffd.zeropage(region.start, ctx.page)
    ctx.expect("byte", access.result(), b"\0")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# Faults of the kernel itself on behalf of a process that ends


def _end_with_tid_at(address: int, over: threading.Lock) -> None:
    syscall(SYS_SET_TID_ADDRESS, address)
    over.release()


def exit_with_tid_in_missing_memory(features: int) -> list[int]:
    """End a thread whose clear_child_tid is in missing memory; for `run_child`.

    Returns:
        The numbers of unread messages, of threads that wait, and of threads that did not end.
    """
    with Region.anonymous(SMALL_PAGE) as region, Userfaultfd(features=Feature(features)) as uffd:
        uffd.register(region, mode=MISSING)
        before = set(os.listdir("/proc/self/task"))
        over = threading.Lock()
        over.acquire()
        # Not a Thread: since Python 3.13 join() waits until the kernel has cleared the id.
        _thread.start_new_thread(_end_with_tid_at, (region.start, over))
        over.acquire()  # Python has finished with the thread, and the kernel is about to
        deadline = time.monotonic() + WAIT_S
        while left := set(os.listdir("/proc/self/task")) - before:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        return [*counters(uffd), len(left)]


@case("fault.ok.exit", origin="fs/userfaultfd.c: handle_userfault, PF_EXITING", memory=ANY)
def exit_clears(ctx: Context) -> None:
    """A thread ends without a message if clear_child_tid is in a missing page."""
    child = ctx.run_child(exit_with_tid_in_missing_memory, 0)
    ctx.expect("pending and total, and threads that did not end", child.value, [0, 0, 0])


@case(
    "fault.ok.core-dump",
    origin="fs/userfaultfd.c: handle_userfault, PF_DUMPCORE",
    memory=("shmem",),
    features=_with_fork,
)
def core_dump(ctx: Context) -> None:
    """A core dump leaves out missing pages, and sends no message for them."""
    if not CORE_PATTERN.exists():
        ctx.lack("core_pattern", "the kernel has no CONFIG_COREDUMP")
    if "|" in (pattern := CORE_PATTERN.read_text()) or "/" in pattern:
        ctx.lack("core_pattern", f"cores go to {pattern.strip()}")
    region = ctx.make(4)
    folder = ctx.enter(tempfile.TemporaryDirectory())
    path = ctypes.create_string_buffer(folder.encode())
    none_blocked = ctypes.create_string_buffer(MASK_BYTES)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, bytes([VALUE]) * ctx.page)
    child = ctx.fork()
    assert child.uffd is not None
    ctx.expect("chdir", child.syscall(SYS_CHDIR, ctypes.addressof(path)), 0)
    mask = (SIG_SETMASK, ctypes.addressof(none_blocked), 0, MASK_BYTES)
    ctx.expect("rt_sigprocmask", child.syscall(SYS_SIGPROCMASK, *mask), 0)
    Path(f"/proc/{child.pid}/coredump_filter").write_text(ANON_SHARED)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(child.pid, resource.RLIMIT_CORE, unlimited)
    os.kill(child.pid, signal.SIGXCPU)  # a signal that no runtime ignores
    ended = ctx.start(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT).result()
    assert ended is not None
    ctx.expect("si_code of the child's end", ended.si_code, os.CLD_DUMPED)
    ctx.expect_quiet(child.uffd)
    cores = list(Path(folder).iterdir())
    ctx.expect("number of cores", len(cores), 1)
    with cores[0].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as core:
        found = core.find(bytes([VALUE]) * ctx.page) >= 0
    ctx.expect("whether the core has the page that is present", found, True)
