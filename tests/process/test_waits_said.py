"""A thread that waits while nobody reads the userfaultfd is reported on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import re
import select
import signal
import socket
import threading
import time
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    Pagefault,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.handover import recv_uffd, send_uffd
from pyuffd.testing import needs, no_leaks
from pyuffd.testing._run import SCALE, ChildResult
from tests._child import run_child
from tests._memory import PAGE, memory_of, memory_params
from tests._tasks import of_threads
from tests.kernel._serving import thread_names, wait_until

Reader = Literal["handler", "user"]
READERS: tuple[Reader, ...] = ("handler", "user")
EVENTS = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP | Feature.EVENT_FORK
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MINOR = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
MODES = {"missing": Feature(0), "wp": WP, "minor": MINOR}
LATE_S = 20.0  # the line comes after 2 s, and the machine may be busy
SAID_S = 2.0
SILENT_S = 3.5  # to see that nothing is written; otherwise a line would come after 2.5 s
BUDGET_S = 2 * LATE_S

libc = ctypes.CDLL(None, use_errno=True)

pytestmark = needs(Feature(0))


# A process that waits in vain ends as soon as that was reported


def end_when_said() -> None:
    """Let another process copy stderr, and end this one with SIGTERM after a line from pyuffd."""
    reading, writing = os.pipe()
    parent = os.getpid()
    began = time.monotonic()
    if os.fork() == 0:
        os.close(writing)
        text = b""
        while b"pyuffd: " not in text or not text.endswith(b"\n"):
            left = began + LATE_S * SCALE - time.monotonic()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                break
            text += os.read(reading, 1 << 16)
        os.write(2, text + f"after {time.monotonic() - began} s\n".encode())
        os.kill(parent, signal.SIGTERM)
        os._exit(0)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def line_of(ended: ChildResult) -> str:
    """Return the one line about the wait, which came late enough."""
    lines = ended.stderr.splitlines()
    assert float(lines[-1].split()[1]) >= SAID_S
    (line,) = [line for line in lines if line.startswith("pyuffd: ")]
    assert re.search(r"thread \d+ \(.*\) of process \d+ has waited for \d+ s", line)
    assert "nobody reads userfaultfd" in line
    return line


def advice(reader: Reader) -> str:
    return "has not been started, call start()" if reader == "handler" else "read_events()"


def registered(
    uffd: Userfaultfd, region: Region, reader: Reader, mode: str = "missing"
) -> Handler | None:
    """Register it with a handler that does not start, or without one."""
    modes = RegisterMode[mode.upper()]
    if reader == "user":
        uffd.register(region, mode=modes)
        return None
    source = BufferSource(b"A" * region.length) if mode == "missing" else None
    handler = Handler(uffd, autostart=False)
    handler.serve(region, source, mode=modes)
    return handler


def prepare(region: Region, mode: str) -> None:
    if mode == "wp":
        region.fill(1)
    if mode == "minor":
        assert region.fd is not None
        with mmap.mmap(region.fd, region.length) as other:
            other.write(b"m" * region.length)


def touch(region: Region, mode: str, with_gil: bool) -> None:
    """Touch the second page."""
    address = region.start + region.page_size
    if mode == "wp" and with_gil:
        (ctypes.c_char * 1).from_address(address)[0] = b"x"
    elif mode == "wp":
        region.write(region.page_size, b"x")
    elif with_gil:
        ctypes.string_at(address, 1)
    else:
        region.read(region.page_size, 1)


def touches(
    mode: str, memory: str, reader: Reader, with_gil: bool, events: bool, blocking: bool
) -> None:
    end_when_said()
    with (
        contextlib.closing(memory_of(memory)) as make,
        Userfaultfd(
            features=MODES[mode] | (EVENTS if events else Feature(0)), nonblocking=not blocking
        ) as uffd,
    ):
        region = make.pages(3)
        prepare(region, mode)
        handler = registered(uffd, region, reader, mode)
        if mode == "wp" and handler is not None:
            handler.writeprotect(region)
        elif mode == "wp":
            uffd.writeprotect(region)
        print(f"{region.start:#x} {region.start + region.page_size:#x}", flush=True)
        touch(region, mode, with_gil)
        raise AssertionError("it went on")


def check_touch(
    mode: str,
    memory: str,
    reader: Reader = "handler",
    *,
    with_gil: bool = True,
    events: bool = False,
    blocking: bool = False,
) -> None:
    ended = run_child(
        touches,
        *(mode, memory, reader, with_gil, events, blocking),
        expect=-signal.SIGTERM,
        budget_s=BUDGET_S,
    )
    start, page = ended.stdout.split()
    kind = "write-protected page" if mode == "wp" else "page"
    line = line_of(ended)
    assert f" s for {kind} {page} of [{start}, " in line
    assert advice(reader) in line


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("mode", ["missing", pytest.param("wp", marks=needs(WP))])
def test_page_of_a_handler_that_was_not_started(mode: str, memory: str) -> None:
    check_touch(mode, memory)


@pytest.mark.crossing
@needs(MINOR)
@pytest.mark.parametrize(
    "memory", memory_params("shmem", "shmem-private", "hugetlb", "hugetlb-private")
)
def test_minor_page_of_a_handler_that_was_not_started(memory: str) -> None:
    check_touch("minor", memory)


@pytest.mark.crossing
@pytest.mark.parametrize("with_gil", [True, False], ids=["gil", "no-gil"])
@pytest.mark.parametrize(
    "events", [False, pytest.param(True, marks=needs(EVENTS))], ids=["no-events", "events"]
)
@pytest.mark.parametrize("reader", READERS)
def test_page_by_reader(reader: Reader, events: bool, with_gil: bool) -> None:
    check_touch("missing", "anon", reader, with_gil=with_gil, events=events)


def test_page_of_a_blocking_userfaultfd() -> None:
    """The kernel does not allow polling it."""
    check_touch("missing", "anon", "user", blocking=True)


def touches_with_little_cpu(busy: int) -> None:
    """The thread that waits runs only when nothing else wants its CPU."""
    end_when_said()
    cpu = min(os.sched_getaffinity(0))
    for _ in range(busy):
        if os.fork() == 0:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            os.sched_setaffinity(0, {cpu})
            while True:
                pass
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        registered(uffd, region, "user")

        def touch_slowly() -> None:
            os.sched_setaffinity(0, {cpu})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            region.touch(2 * PAGE)

        print(f"{region.start:#x} {region.start + 2 * PAGE:#x}", flush=True)
        threading.Thread(target=touch_slowly).start()
        time.sleep(BUDGET_S)


def test_a_thread_that_gets_little_cpu() -> None:
    """Finding its page takes several faults, and each waits for the CPU."""
    ended = run_child(touches_with_little_cpu, 3, expect=-signal.SIGTERM, budget_s=BUDGET_S)
    start, page = ended.stdout.split()
    line = line_of(ended)
    assert f" s for page {page} of [{start}, " in line or " s for a page in [" in line


# Events


def changes(what: str, reader: Reader) -> None:
    end_when_said()
    with Userfaultfd(features=EVENTS) as uffd, Region.anonymous(4 * PAGE) as region:
        registered(uffd, region, reader)
        start, length = ctypes.c_void_p(region.start), ctypes.c_size_t(2 * PAGE)
        print(f"{region.start:#x}, {2 * PAGE:#x}", flush=True)
        if what == "fork":
            os.fork()
        elif what == "madvise":
            libc.madvise(start, length, mmap.MADV_DONTNEED)
        elif what == "munmap":
            libc.munmap(start, length)
        else:
            libc.mremap(start, length, ctypes.c_size_t(4 * PAGE), 1)
        raise AssertionError("it went on")


@pytest.mark.crossing
@needs(EVENTS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ["fork", "madvise", "munmap", "mremap"])
def test_event(what: str, reader: Reader) -> None:
    ended = run_child(changes, what, reader, expect=-signal.SIGTERM, budget_s=BUDGET_S)
    line = line_of(ended)
    call = "fork()" if what == "fork" else f"{what}({ended.stdout.strip()})"
    assert f" s in {call} for its event to be read" in line
    assert advice(reader) in line


# How often it is written, and what happens afterwards


def wait_until_said(count: int) -> None:
    """Wait until this child's stderr, which is a file, has this many lines."""
    give_up = time.monotonic() + LATE_S * SCALE
    while os.pread(2, 1 << 16, 0).count(b"pyuffd:") < count and time.monotonic() < give_up:
        time.sleep(0.1)


def read_together(together: threading.Barrier, region: Region, offset: int) -> None:
    together.wait()
    region.read(offset, 1)


def waits_twice() -> None:
    """Written once, however long it lasts, and again for a new wait. The answer is right anyway."""
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        for number, page in enumerate((0, 2), 1):
            together = threading.Barrier(2)
            readers = [
                threading.Thread(target=read_together, args=(together, region, page * PAGE))
                for _ in "ab"
            ]
            for reader in readers:
                reader.start()
            wait_until_said(number)
            time.sleep(SILENT_S)
            for event in uffd.read_events():
                assert isinstance(event, Pagefault)
                assert event.address == region.start + page * PAGE
                uffd.fill_copy(event.address, b"c" * PAGE)
            for reader in readers:
                reader.join()
            assert region.read(page * PAGE, 1) == b"c"


def test_said_once_for_each_wait() -> None:
    ended = run_child(waits_twice, budget_s=4 * SILENT_S + LATE_S)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("pyuffd: ")]
    assert len(lines) == 2
    assert all("(1 more thread waits)" in line for line in lines)


def starts_late() -> None:
    """Waits that were reported are served as usual."""
    with Userfaultfd(features=EVENTS) as uffd, Region.anonymous(2 * PAGE) as region:
        handler = registered(uffd, region, "handler")
        assert handler is not None
        waiting = threading.Thread(target=region.touch)
        waiting.start()
        wait_until_said(1)
        handler.start()
        waiting.join()
        assert region.read() == b"A" * 2 * PAGE
        assert "uffd-watch" not in thread_names() or wait_gone()
        handler.stop()
        assert handler.stats().faults["missing"] >= 2  # one may have been sent twice


def wait_gone() -> bool:
    wait_until(lambda: "uffd-watch" not in thread_names(), "the thread ends")
    return True


@needs(EVENTS)
def test_a_handler_that_is_started_late_serves_what_waits() -> None:
    ended = run_child(starts_late, budget_s=LATE_S)
    assert ended.stderr.count("pyuffd: ") == 1


def switched_off() -> None:
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        registered(uffd, region, "user")
        assert "uffd-watch" not in thread_names()
        waiting = threading.Thread(target=region.touch)
        waiting.start()
        time.sleep(SILENT_S)
        uffd.fill_zero(region)
        waiting.join()


def test_can_be_switched_off() -> None:
    ended = run_child(switched_off, env={"PYUFFD_WATCH": "0"}, budget_s=LATE_S)
    assert "pyuffd: " not in ended.stderr


# If there is an answer, however slow


def touch_later(region: Region, pages: int) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=region.read, args=(page * region.page_size, 1))
        for page in range(pages)
    ]
    for thread in threads:
        thread.start()
    return threads


def read_by_hand() -> None:
    """One message at a time, each answered late: the others wait unread meanwhile."""
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        threads = touch_later(region, 4)
        for _ in range(4):
            wait_until(lambda: bool(select.select([uffd], [], [], 0)[0]), "a message")
            (event,) = uffd.read_events(1)
            assert isinstance(event, Pagefault)
            time.sleep(SILENT_S / 2)
            uffd.fill_zero(event.address, PAGE)
        for thread in threads:
            thread.join()


def read_beside_the_library() -> None:
    """By os.read() of the number, which this library does not see."""
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        threads = touch_later(region, 4)
        for _ in range(4):
            wait_until(lambda: bool(select.select([uffd], [], [], 0)[0]), "a message")
            address = int.from_bytes(os.read(uffd.fileno(), 32)[16:24], "little")
            time.sleep(SILENT_S / 2)
            uffd.fill_zero(address // PAGE * PAGE, PAGE)
        for thread in threads:
            thread.join()


def read_by_a_task() -> None:
    async def answer(uffd: Userfaultfd, pages: int) -> None:
        async for event in uffd.events():
            assert isinstance(event, Pagefault)
            await asyncio.sleep(SILENT_S / 2)
            uffd.fill_zero(event.address // PAGE * PAGE, PAGE)
            pages -= 1
            if not pages:
                return

    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        threads = touch_later(region, 4)
        asyncio.run(answer(uffd, 4))
        for thread in threads:
            thread.join()


def served_slowly() -> None:
    def slow(_offset: int, length: int) -> bytes:
        time.sleep(SILENT_S)
        return b"s" * length

    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver="thread", stall_timeout_s=60) as handler,
    ):
        handler.serve(region, CallableSource(slow))
        assert "uffd-watch" not in thread_names()
        for thread in touch_later(region, 2):
            thread.join()


def refused_beside() -> None:
    """A second handler is refused; the first one keeps answering, slowly."""

    def slow(_offset: int, length: int) -> bytes:
        with pytest.raises(ValueError, match="has a handler already"):
            Handler(uffd)
        time.sleep(SILENT_S)
        return b"s" * length

    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver="thread", stall_timeout_s=60) as handler,
    ):
        handler.serve(region, CallableSource(slow))
        with pytest.raises(ValueError, match="has a handler already"):
            Handler(uffd)
        assert "uffd-watch" not in thread_names()
        for thread in touch_later(region, 2):
            thread.join()


def read_by_a_child() -> None:
    """A fork has the descriptor, which this library does not know."""
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        pid = os.fork()
        if pid == 0:
            fd = uffd._number.fd
            with Userfaultfd.from_fd(os.dup(fd)) as adopted:
                for _ in range(4):
                    select.select([adopted], [], [])
                    (event,) = adopted.read_events(1)
                    assert isinstance(event, Pagefault)
                    time.sleep(SILENT_S / 2)
                    adopted.fill_zero(event.address // PAGE * PAGE, PAGE)
            os._exit(0)
        for thread in touch_later(region, 4):
            thread.join()
        assert os.waitpid(pid, 0)[1] == 0


def sent_to_a_monitor() -> None:
    """It was sent, and the other process does not read for a while."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        uffd.register(region)
        pid = os.fork()
        if pid == 0:
            with recv_uffd(theirs) as handover:
                time.sleep(SILENT_S)
                while region.length:
                    for event in handover.uffd.read_events():
                        assert isinstance(event, Pagefault)
                        handover.uffd.fill_zero(region.start, region.length)
                        os._exit(0)
        send_uffd(ours, uffd, [region])
        for thread in touch_later(region, 2):
            thread.join()
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    "answered",
    [
        read_by_hand,
        read_beside_the_library,
        read_by_a_task,
        served_slowly,
        refused_beside,
        read_by_a_child,
        sent_to_a_monitor,
    ],
)
def test_nothing_is_said_where_somebody_answers(answered: object) -> None:
    assert callable(answered)
    ended = run_child(answered, budget_s=4 * SILENT_S + LATE_S)
    assert "pyuffd: " not in ended.stderr


def sent_to_the_dead() -> None:
    end_when_said()
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        uffd.register(region)
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listening:
            listening.bind(f"\0pyuffd-waits-{os.getpid()}")
            listening.listen()
            pid = os.fork()
            if pid == 0:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
                    own.connect(listening.getsockname())
                    recv_uffd(own)
                    os._exit(0)
            print(pid, flush=True)
            with listening.accept()[0] as connected:
                send_uffd(connected, uffd, [region])
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ctypes.string_at(region.start, 1)


def test_a_monitor_that_has_exited() -> None:
    ended = run_child(sent_to_the_dead, expect=-signal.SIGTERM, budget_s=BUDGET_S)
    assert f"it was sent to process {ended.stdout.strip()}, which has exited" in line_of(ended)


# The thread


def only_while_needed() -> None:
    with no_leaks(), Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        assert "uffd-watch" not in thread_names()
        uffd.register(region)
        assert thread_names().count("uffd-watch") == 1
        with Userfaultfd() as other, Region.anonymous(PAGE) as second:
            other.register(second)
            assert thread_names().count("uffd-watch") == 1
        uffd.unregister(region)
        wait_gone()
        with Handler(uffd) as handler:
            handler.serve(region, BufferSource(b"A" * region.length))
            assert "uffd-watch" not in thread_names()
        uffd.register(region)
        wait_until(lambda: "uffd-watch" in thread_names(), "it begins again")
        os.close(uffd.detach())
        wait_gone()


def test_there_is_a_thread_only_while_it_is_needed() -> None:
    run_child(only_while_needed)


def in_forks() -> None:
    """A fork has no such thread, and makes one for its own userfaultfds."""
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        pid = os.fork()
        if pid == 0:
            assert "uffd-watch" not in thread_names()
            with Userfaultfd() as own, Region.anonymous(PAGE) as other:
                own.register(other)
                assert "uffd-watch" in thread_names()
            wait_gone()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert "uffd-watch" in thread_names()


def test_forks() -> None:
    """Without EVENT_FORK the thread does not make Python warn of a fork (3.12)."""
    run_child(in_forks)


def masks() -> None:
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        for status in of_threads("self", "status").values():
            if "uffd-watch" in status:
                blocked = re.search(r"SigBlk:\s*(\S+)", status)
                assert blocked is not None
                # All but SIGKILL, SIGSTOP and the C library's own two.
                assert int(blocked[1], 16) | 0x1_8004_0100 == 0xFFFF_FFFF_FFFF_FFFF
                return
        raise AssertionError("no such thread")


def test_no_signal_reaches_the_thread() -> None:
    run_child(masks)
