"""The known pitfalls without a file of their own; each of the sixteen must have checks."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import mmap
import os
import select
import signal
import weakref

import pytest

from pyuffd import (
    BufferSource,
    CopyMode,
    Feature,
    Handler,
    LayoutChangedError,
    PageBit,
    PageExistsError,
    Pagefault,
    PageState,
    RangeBusyError,
    Region,
    RegisterMode,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
    Userfaultfd,
    ZeroSource,
    _memory,
    lowlevel,
    pagemap,
)
from pyuffd.testing import GatedSource, needs_privilege
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import memory_of
from tests.kernel._faults import Task, next_fault, wait_for_pending
from tests.kernel._serving import (
    in_fork,
    is_efault,
    is_lost,
    states,
    wait_for_stalled,
    wait_until,
)
from tests.kernel.test_userfaultfd_open import drop_capability, needs_device, needs_refusal
from tests.process._pitfalls import (
    ALL,
    ANON,
    BOTH,
    EVERY,
    NAMES,
    SMALL,
    Pages,
    Setting,
    all_pitfalls,
    checks_of,
    over_or_blocked,
    page,
    pitfall,
    reading,
    wait_blocked,
    wait_changing,
)

MODULES = [
    "tests.kernel.test_adopted_descriptors",
    "tests.kernel.test_fault_races",
    "tests.kernel.test_layout_events",
    "tests.kernel.test_layout_races",
    "tests.kernel.test_thread_driver",
    "tests.process.test_forks",
    "tests.process.test_pitfalls",
    "tests.process.test_stopping",
]
SYS_READ, SYS_MADVISE = 0, 28
NOBODY = 65534
PAGE = os.sysconf("SC_PAGE_SIZE")
REMOVE = Feature.EVENT_REMOVE
WP_EVERYWHERE = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP


def count_checks() -> None:
    for module in MODULES:
        importlib.import_module(module)
    assert all_pitfalls() == set(NAMES)


def test_every_pitfall_has_a_check() -> None:
    run_child(count_checks)  # numpy, which one of them imports, starts threads


# 2: EAGAIN while the layout changes


@pitfall(2, "populate-tries-again", drivers=BOTH, memory=SMALL, features=REMOVE)
def populate_again(at: Setting) -> None:
    """A prefault that meets EAGAIN is not complete: it continues when the event has been read."""
    with at.served(5, REMOVE) as (handler, region, data):
        with holding(Point.STEP_APPLIED) as point:
            reader = reading(region, 4)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
            populater = Task(handler.populate, region, 0, 4 * data.size)
        assert reader.result() == data[4]
        dropper.result()
        # The dropped page is zeros, whether populate counts it or not.
        assert populater.result() in (3 * data.size, 4 * data.size)
        assert region.read() == data.of(0, None, 2, 3, 4)
        assert handler.stats().failed == 0


@pitfall(2, "writeprotect-tries-again", drivers=BOTH, memory=SMALL, features=REMOVE | WP_EVERYWHERE)
def writeprotect_again(at: Setting) -> None:
    """A write-protect that meets EAGAIN has no effect: it continues when the event is read."""
    with at.serving(REMOVE | WP_EVERYWHERE) as (handler, memory):
        region = memory.pages(4)
        data = Pages(4, memory.page_size)
        handler.serve(region, at.source(data.all), mode=MISSING | WP)
        handler.start()
        region.write(0, data[0])
        with holding(Point.STEP_APPLIED) as point:
            reader = reading(region, 3)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
            protector = Task(handler.writeprotect, region)
            over_or_blocked(protector)
        assert reader.result() == data[3]
        dropper.result()
        protector.result()
        before = handler.stats().faults["wp"]
        region.write(0, b"again")
        assert handler.stats().faults["wp"] == before + 1


# 3: EEXIST does not wake


@pitfall(3, "copy-without-wake", drivers=ALL, memory=EVERY)
def copy_without_wake(at: Setting) -> None:
    """The page is present and its reader still sleeps: after EEXIST the handler must wake it."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(region, at.source(data.all))
        reader = reading(region, 1)
        wait_for_stalled(handler.uffd, 1)
        there = region.start + data.size
        handler.uffd.copy(there, data[0], mode=CopyMode.DONTWAKE)
        assert reader.running
        handler.start()
        assert reader.result() == data[0], "the page that was there first"
        assert handler.stats().messages <= 1  # start() wakes, too
        assert page(region, 0) == data[0]


@pitfall(3, "fill-wakes", memory=EVERY)
def fill_wakes(at: Setting) -> None:
    """fill_copy() and fill_zero() on a present page wake the threads that wait for it."""
    with contextlib.closing(memory_of(at.memory)) as memory, Userfaultfd() as uffd:
        for index in range(2):
            region = memory.pages(1)
            uffd.register(region)
            data = Pages(1, memory.page_size)
            reader = reading(region, 0)
            next_fault(uffd)
            uffd.copy(region.start, data[0], mode=CopyMode.DONTWAKE)
            with pytest.raises(PageExistsError):
                uffd.copy(region.start, data[0])
            if index == 0 or memory.is_hugetlb:
                result = uffd.fill_copy(region, data[0])
            else:
                result = uffd.fill_zero(region)
            assert (result.done, result.already_present) == (0, data.size)
            assert reader.result() == data[0]


# 5: partial results


@pitfall(5, "a-page-in-the-middle", drivers=ALL, memory=EVERY)
def in_the_middle(at: Setting) -> None:
    """A fill stops at a present page, and continues behind it with the right content."""
    with at.served(5) as (handler, region, data):
        handler.uffd.copy(region.start + 2 * data.size, data.zeros)
        filled = handler.populate(region)
        # A Python source is asked page by page, and put_answer counts the requested pages.
        assert filled in (4 * data.size, 5 * data.size)
        assert region.read() == data.of(0, 1, None, 3, 4)
        assert states(handler, region) == [PageState.CLEAN] * 5


@pitfall(5, "counts", memory=EVERY)
def counts(at: Setting) -> None:
    """The short count of copy() is kept, and fill_copy() counts both kinds of pages."""
    with at.serving() as (handler, memory):
        region = memory.pages(4)
        data = Pages(4, memory.page_size)
        handler.uffd.register(region)
        handler.uffd.copy(region.start + 2 * data.size, data.zeros)
        result = handler.uffd.fill_copy(region, data.all)
        assert (result.done, result.already_present) == (3 * data.size, data.size)
        assert region.read() == data.of(0, 1, None, 3)


# 7 and 8: handshake and opening


@pitfall(7, "asked-and-granted")
def handshake(at: Setting) -> None:
    """The kernel returns all that it supports; `features` has only what was asked for."""
    with Userfaultfd(features=Feature.THREAD_ID) as uffd, Userfaultfd() as plain:
        assert uffd.features == Feature.THREAD_ID
        assert plain.features == Feature(0)
        assert uffd.supported == plain.supported
        assert uffd.supported & Feature.THREAD_ID
    unknown = Feature(1 << 62)
    with pytest.raises(UnsupportedFeatureError) as caught:
        Userfaultfd(features=unknown | Feature.THREAD_ID)
    assert caught.value.missing == unknown


@pitfall(7, "fork-events-need-privilege", features=Feature.EVENT_FORK)
def unprivileged(at: Setting) -> None:
    """EVENT_FORK without CAP_SYS_PTRACE is EPERM at the handshake, with the reason."""

    def child() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(UffdPermissionError) as caught:
            Userfaultfd(features=Feature.EVENT_FORK, user_mode_only=True)
        assert caught.value.errno == errno.EPERM
        assert "CAP_SYS_PTRACE" in caught.value.hint

    assert in_fork(child) == 0


@pitfall(8, "descriptor-flags")
def descriptor(at: Setting) -> None:
    """Always close-on-exec; an adopted descriptor becomes nonblocking, whatever the sender did."""
    with Userfaultfd() as uffd, Userfaultfd(nonblocking=False) as blocking:
        for one in (uffd, blocking):
            assert fcntl.fcntl(one.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        copy = os.dup(blocking.fileno())
        os.set_inheritable(copy, True)
        with Userfaultfd.from_fd(copy) as adopted:
            assert fcntl.fcntl(adopted.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
            assert not os.get_inheritable(adopted.fileno())


def refusal() -> UffdPermissionError | None:
    try:
        Userfaultfd().close()
    except UffdPermissionError as error:
        return error
    return None


@pitfall(8, "refused-with-reasons")
def refused(at: Setting) -> None:
    """A process without privilege learns which setting would allow it, and what works without."""
    # The user nobody may not be able to read the interpreter's library: import everything first.
    codecs.lookup("ascii")
    for late in ("_refusals", "_probe", "_vmas", "_diagnose", "_left", "_limits"):
        importlib.import_module(f"pyuffd.{late}")

    def child() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        error = refusal()
        if error is not None:  # this machine may allow it to all users
            assert error.hint
            assert "user_mode_only" in str(error)
        with (
            Userfaultfd(user_mode_only=True) as uffd,
            Region.anonymous(PAGE) as region,
            Handler(uffd) as handler,
        ):
            handler.serve(region, BufferSource(b"x" * PAGE))
            handler.start()
            # With it, an access by the kernel is no fault, but EFAULT.
            assert is_efault(region, 0)
            assert region.read(0, 1) == b"x"

    assert in_fork(child) == 0


@pitfall(
    8,
    "device-where-the-call-is-refused",
    marks=(needs_device(), needs_refusal(), needs_privilege("CAP_SYS_PTRACE")),
)
def device(at: Setting) -> None:
    """Without CAP_SYS_PTRACE the system call is refused, but root may open the device."""
    drop_capability("CAP_SYS_PTRACE")
    with pytest.raises(UffdPermissionError):
        lowlevel.open_syscall(os.O_CLOEXEC)
    with at.served(1) as (_, region, data):
        assert region.read() == data.all


# 9 and 10: poll, read, messages


@pitfall(9, "ready-and-then-nothing", drivers=BOTH)
def ready_then_nothing(at: Setting) -> None:
    """Another thread resolves the fault after the handler was woken: read() says EAGAIN."""
    with at.served(3) as (handler, region, data):
        with holding(Point.STEP_APPLIED) as point:
            first = reading(region, 0)
            point.wait()
            second = reading(region, 1)
            wait_for_pending(handler.uffd, 1)
            handler.uffd.fill_copy(region.start + data.size, data[1])
            assert second.result() == data[1]
            wait_for_pending(handler.uffd, 0)
        assert first.result() == data[0]
        assert page(region, 2) == data[2]
        assert handler.stats().failed == 0


@pitfall(9, "blocking-descriptor-is-refused")
def blocking(at: Setting) -> None:
    """poll() always reports POLLERR on a blocking userfaultfd: a loop would spin on it."""
    with Userfaultfd(nonblocking=False) as uffd:
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        assert poll.poll(0) == [(uffd.fileno(), select.POLLERR)]
        with pytest.raises(ValueError):
            Handler(uffd)


@pitfall(9, "interrupted-read")
def interrupted_read(at: Setting) -> None:
    """read() of a blocking descriptor ends with EINTR when a signal comes, and is no error."""
    with Userfaultfd(nonblocking=False) as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        came: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))  # no SA_RESTART
        events = Task(uffd.read_events)
        wait_blocked(events, SYS_READ)
        signal.pthread_kill(events._thread.ident or 0, signal.SIGUSR1)
        wait_until(lambda: came != [], "the signal came")
        reader = reading(region, 0)
        assert [type(event) for event in events.result()] == [Pagefault]
        uffd.fill_zero(region)
        assert reader.result() == bytes(PAGE)


def interrupt(reader: Task[bytes]) -> None:
    """Send a thread a signal whose handler is C, so that it runs no Python for it."""
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGUSR1, ctypes.cast(libc.getpid, ctypes.c_void_p))
    signal.pthread_kill(reader._thread.ident or 0, signal.SIGUSR1)


@pitfall(10, "interrupted-while-it-is-resolved", memory=EVERY)
def interrupted(at: Setting) -> None:
    """The access is interrupted after its message was read, and sends another one."""
    with at.served(2) as (handler, region, data):
        with holding(Point.STEP_APPLIED) as point:
            reader = reading(region, 1)
            point.wait()
            interrupt(reader)
            wait_for_pending(handler.uffd, 1)
        assert reader.result() == data[1]
        assert handler.stats().faults == {"missing": 1, "wp": 0, "minor": 0}
        assert handler.stats().filled_pages == 1


@pitfall(10, "interrupted-again-and-again", drivers=("thread",), memory=EVERY)
def interrupted_often(at: Setting) -> None:
    """Several messages of one access: one request, one fill, one fault counted."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        gate = GatedSource(at.source(data.all))
        handler.serve(region, gate)
        handler.start()
        reader = reading(region, 1)
        gate.wait_for_reads(1)
        for messages in (2, 3, 4):
            interrupt(reader)
            wait_until(lambda n=messages: handler.stats().messages == n, "it is read")  # type: ignore[misc]
        gate.open()
        assert reader.result() == data[1]
        assert handler.stats().faults == {"missing": 1, "wp": 0, "minor": 0}
        stats = handler.stats()
        assert (stats.requests, stats.filled_pages) == (1, 1)


@pitfall(10, "two-threads-on-one-page", memory=EVERY)
def two_threads(at: Setting) -> None:
    """Two messages of one page, read at once: one page filled, one fault counted."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(region, at.source(data.all))
        readers = [reading(region, 1) for _ in range(2)]
        wait_for_pending(handler.uffd, 2)
        handler.start()
        assert [reader.result() for reader in readers] == [data[1]] * 2
        stats = handler.stats()
        assert stats.faults == {"missing": 1, "wp": 0, "minor": 0}
        # start() wakes both: one that comes back when the page is present sends no message.
        assert stats.filled_pages == 1
        assert stats.already_present == stats.messages - 1 <= 1


@pitfall(10, "woken-without-a-page", drivers=ALL, memory=SMALL)
def woken(at: Setting) -> None:
    """WAKE alone makes the thread fault again, which is harmless."""
    with at.serving() as (handler, memory):
        region = memory.pages(1)
        data = Pages(1, memory.page_size)
        handler.serve(region, at.source(data.all))
        reader = reading(region, 0)
        wait_for_stalled(handler.uffd, 1)
        handler.start()
        for _ in range(20):
            handler.uffd.wake(region.start, data.size)
        assert reader.result() == data[0]
        handler.stop()  # the counters are written after the wake
        assert handler.stats().filled_pages == 1


# 12: write protection


@pitfall(12, "missing-pages-are-protected", memory=SMALL, features=Feature.PAGEFAULT_FLAG_WP)
def holes(at: Setting) -> None:
    """WRITEPROTECT of missing pages returns 0 and protects nothing: missed writes."""
    with at.serving() as (handler, memory):
        region = memory.pages(4)
        region.write(0, b"there")
        handler.serve(region, None, mode=WP)
        handler.writeprotect(region)
        handler.start()
        region.write(2 * region.page_size, b"noticed")
        # The page table would tell of the write later, but only a fault tells of it in time.
        assert handler.stats().faults["wp"] == 1
        assert states(handler, region)[2] == PageState.DIRTY
        assert states(handler, region)[0] == PageState.CLEAN


@pitfall(12, "zeros-arrive-protected", drivers=ALL, memory=EVERY, features=REMOVE)
def zeros_protected(at: Setting) -> None:
    """A dropped page that comes back as zeros must be protected in the same step.

    ZEROPAGE and then WRITEPROTECT has windows in which a write is lost.
    """
    with at.serving(REMOVE | Feature.PAGEFAULT_FLAG_WP) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        handler.serve(region, at.source(data.all), mode=MISSING | WP)
        handler.start()
        assert region.read() == data.all
        region.punch_hole(data.size, data.size)
        assert page(region, 1) == data.zeros
        region.write(data.size, b"written")
        region.write(0, b"written")
        wait_until(lambda: states(handler, region)[:2] == [PageState.DIRTY] * 2, "both are dirty")
        assert states(handler, region)[2] == PageState.CLEAN
        wait_until(lambda: handler.stats().faults["wp"] == 2, "both are counted")


@pitfall(12, "two-mappings", memory=ANON, features=Feature.PAGEFAULT_FLAG_WP)
def two_mappings(at: Setting) -> None:
    """Protecting a range of two VMAs protects both."""
    with at.serving() as (handler, memory):
        region = memory.pages(4)
        region.fill(1)
        _memory.mprotect(region.start + 2 * PAGE, PAGE, mmap.PROT_READ)
        _memory.mprotect(region.start + 2 * PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        handler.serve(region, None, mode=WP)
        handler.writeprotect(region)
        handler.start()
        region.touch(write=True)
        wait_until(lambda: states(handler, region) == [PageState.DIRTY] * 4, "all are dirty")


@pitfall(
    12,
    "minor-pages-arrive-protected",
    memory=("shmem",),
    features=Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM,
)
def minor_protected(at: Setting) -> None:
    """CONTINUE has a mode for it, like COPY: protecting afterwards would miss writes."""
    with at.serving(Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        with region.alias() as alias:
            alias.write(0, data.all)
        handler.serve(region, None, mode=RegisterMode.MINOR | WP)
        handler.start()
        assert region.read() == data.all
        region.write(data.size, b"written")
        assert states(handler, region) == [PageState.CLEAN, PageState.DIRTY]
        assert handler.stats().faults == {"missing": 0, "wp": 1, "minor": 2}


@pitfall(
    12,
    "protection-is-lifted-first",
    memory=("anon", "hugetlb", "hugetlb-private"),
    features=Feature.PAGEFAULT_FLAG_WP,
)
def lifted_first(at: Setting) -> None:
    """A page left protected in a range that lost WP: on hugetlb a write never returns.

    On other memory bit 57 of its pagemap entry stays, and says that it is protected.
    """
    with at.serving(Feature.PAGEFAULT_FLAG_WP) as (handler, memory):
        region = memory.pages(2)
        region.fill(1)
        handler.uffd.register(region, mode=WP)
        handler.uffd.writeprotect(region)
        handler.uffd.register(region, mode=MISSING)
        with pagemap.Pagemap() as map_:
            assert map_.read(region).count(PageBit.UFFD_WP) == 0
        Task(region.write, 0, b"written").result()
        assert region.read(0, 8) == b"written\1"


# 13: page sizes and ranges


@pitfall(13, "split-by-mprotect", drivers=ALL, memory=SMALL)
def split(at: Setting) -> None:
    """A range of several VMAs: an ioctl across them fails with ENOENT and does nothing.

    If that meant "the range is gone", populate would fail, and stop() would not seal: zeros.
    """
    with at.served(9) as (handler, region, data):
        size = data.size
        _memory.mprotect(region.start + 3 * size, 2 * size, mmap.PROT_READ)
        assert page(region, 8) == data[8]
        assert handler.populate(region, 0, 6 * size) == 6 * size
        assert region.read(0, 6 * size) == data.of(*range(6))
        handler.stop()
        assert region.read(0, 6 * size) == data.of(*range(6))
        assert is_lost(region, 6 * size, size)
        assert is_lost(region, 7 * size, size)


@pitfall(13, "split-and-sealed", drivers=ALL, memory=SMALL)
def split_sealed(at: Setting) -> None:
    """The same with every page absent: no page may become zeros."""
    with at.served(9) as (handler, region, data):
        _memory.mprotect(region.start + 3 * data.size, 2 * data.size, mmap.PROT_READ)
        handler.stop()
        assert [is_lost(region, index * data.size, data.size) for index in range(9)] == [True] * 9


@pitfall(13, "prefetch-across-a-split", drivers=ALL, memory=SMALL)
def prefetch_split(at: Setting) -> None:
    """The chunk around a fault lies in two VMAs: the fault's own page is filled anyway."""
    with at.serving(prefetch=8 * PAGE) as (handler, memory):
        region = memory.pages(8)
        data = Pages(8, memory.page_size)
        handler.serve(region, at.source(data.all))
        handler.start()
        _memory.mprotect(region.start + 3 * data.size, 2 * data.size, mmap.PROT_READ)
        assert page(region, 2) == data[2]
        assert page(region, 5) == data[5]
        assert region.read() == data.all


@pitfall(13, "any-address-in-the-page", drivers=ALL, memory=EVERY)
def addresses(at: Setting) -> None:
    """With EXACT_ADDRESS a fault's address is any byte of a page, of the region's own size."""
    for features in (Feature(0), Feature.EXACT_ADDRESS):
        with at.served(3, features) as (_, region, data):
            odd = data.size - 7
            assert region.read(data.size + odd, 3) == data[1][:3]
            assert region.read(2 * data.size + 1, 1) == data[2][:1]
            assert region.read(odd, 14) == data[0][:7] + data[1][:7]


@pitfall(13, "zeros-of-any-size", drivers=BOTH, memory=EVERY)
def zeros(at: Setting) -> None:
    """Huge pages do not support ZEROPAGE: zeros are copied."""
    with at.serving() as (handler, memory):
        region, other = memory.pages(2), memory.pages(2)
        handler.serve(region, ZeroSource())
        handler.start()
        assert region.read() == bytes(region.length)
        handler.uffd.register(other)
        assert handler.uffd.fill_zero(other).done == other.length
        assert other.read() == bytes(other.length)
        assert handler.stats().failed == 0


# 15: MOVE, POISON, CONTINUE


@pitfall(15, "poison-where-a-page-is", memory=EVERY, features=Feature.POISON)
def poison_present(at: Setting) -> None:
    """EEXIST: the content stays; fill_poison() counts it instead of failing."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.uffd.register(region)
        handler.uffd.copy(region.start, data[0])
        with pytest.raises(PageExistsError):
            handler.uffd.poison(region.start, data.size)
        result = handler.uffd.fill_poison(region)
        assert (result.done, result.already_present) == (data.size, data.size)
        assert page(region, 0) == data[0]
        assert is_lost(region, data.size)


@pitfall(15, "move-errors", features=Feature.MOVE)
def move_errors(at: Setting) -> None:
    """A hole is ENOENT, a page that a fork shares EBUSY, shared memory EINVAL."""
    with (
        Userfaultfd(features=Feature.MOVE) as uffd,
        Region.anonymous(2 * PAGE) as region,
        Region.anonymous(2 * PAGE) as source,
        Region.memfd(PAGE) as shared,
    ):
        uffd.register(region)
        source.write(0, b"moved")
        with pytest.raises(LayoutChangedError):
            uffd.move(region.start, source.start + PAGE, PAGE)
        shared.write(0, b"shared")
        with pytest.raises(UffdOSError) as caught:
            uffd.move(region.start, shared.start, PAGE)
        assert caught.value.errno == errno.EINVAL
        go, went = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(went)
            os.read(go, 1)
            os._exit(0)
        os.close(go)
        with pytest.raises(RangeBusyError):
            uffd.move(region.start, source.start, PAGE)
        os.close(went)
        os.waitpid(pid, 0)
        source.write(0, b"moved")  # no longer shared
        uffd.fill_move(region.start, source.start, PAGE)
        assert region.read(0, 5) == b"moved"


@pitfall(15, "move-around-a-page", features=Feature.MOVE)
def move_around(at: Setting) -> None:
    """A present page stays, and the rest comes from the right places."""
    data = Pages(3, PAGE)
    with (
        Userfaultfd(features=Feature.MOVE) as uffd,
        Region.anonymous(3 * PAGE) as region,
        Region.anonymous(3 * PAGE) as source,
    ):
        uffd.register(region)
        source.write(0, data.all)
        uffd.zeropage(region.start + PAGE, PAGE)
        result = uffd.fill_move(region, source.start)
        assert (result.done, result.already_present) == (2 * PAGE, PAGE)
        assert region.read() == data.of(0, None, 2)
        assert page(source, 1) == data[1]


@pitfall(15, "continue-needs-the-page", memory=("shmem",), features=Feature.MINOR_SHMEM)
def continue_hole(at: Setting) -> None:
    """CONTINUE maps pages of the page cache: EFAULT for a hole, EEXIST for a mapped page."""
    with at.serving(Feature.MINOR_SHMEM) as (handler, memory):
        region = memory.pages(2)
        handler.uffd.register(region, mode=RegisterMode.MINOR)
        with region.alias() as alias:
            alias.write(0, b"cached")
        with pytest.raises(UffdOSError) as caught:
            handler.uffd.continue_(region.start + region.page_size, region.page_size)
        assert caught.value.errno == errno.EFAULT
        handler.uffd.fill_continue(region.start, region.page_size)
        with pytest.raises(PageExistsError):
            handler.uffd.continue_(region.start, region.page_size)
        assert region.read(0, 6) == b"cached"


# 16: lifetime


@pitfall(16, "source-is-kept", drivers=BOTH)
def source_is_kept(at: Setting) -> None:
    """Only the handler refers to the source; its memory must live as long as it is served."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        source = at.source(data.all)
        there = weakref.ref(source)
        handler.serve(region, source)
        # The handler notes it as well, but threads of the engine may outlive that note.
        for served in handler._served.values():
            served.source = None
        del source
        gc.collect()
        assert there() is not None
        handler.start()
        assert region.read() == data.all
        handler.unserve(region)
        gc.collect()
        assert there() is None


test_pitfalls = checks_of(__name__)
