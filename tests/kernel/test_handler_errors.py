"""Handler: content that cannot be read, and what stop() does with pages that were not loaded.

Never zeros: a thread that touches such a page gets SIGBUS (the kernel EFAULT), waits, or is
killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd._describe import counted
from pyuffd.testing import needs_hugepages, needs_privilege
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._faults import Task
from tests.kernel._mounts import mounted
from tests.kernel._serving import (
    AnyDriver,
    Driver,
    both_drivers,
    content,
    ending_thread,
    everywhere,
    handler_of,
    is_lost,
    peek,
    serving,
    states,
    wait_for_stalled,
    wait_in_system_call,
    wait_until,
    with_both_drivers,
)
from tests.process._pitfalls import Data

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
CLOCK_NANOSLEEP = 230
ABSENT, CLEAN = PageState.ABSENT, PageState.CLEAN
PROT_NONE = 0
MADV_REMOVE = 9


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        yield file


def serve_file(handler: Handler, region: Region, file: IO[bytes], mode: RegisterMode) -> None:
    with FileSource(file) as source:
        handler.serve(region, source, mode=mode)


def expect_failure(handler: Handler, address: int, page_size: int, pages: int) -> None:
    """Stop, and check the error: its place, its cause, the number of pages."""
    with pytest.raises(HandlerError) as caught:
        handler.stop()
    error = caught.value
    assert (error.start, error.length) == (address, page_size), error
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENODATA
    assert f"{address:#x}" in str(error)
    assert f"({counted(pages, 'page')} in all)" in str(error)
    handler.stop()  # said once


# poison


def truncated(name: str, mode: int, protect_first: bool) -> None:
    with serving("native", name) as (handler, memory):
        region = memory.pages(4)
        size, data = memory.page_size, content(region.length)
        with file_of(data) as file:
            serve_file(handler, region, file, RegisterMode(mode))
            if protect_first:
                handler.writeprotect(region)
            handler.start()
            assert not is_lost(region)
            file.truncate(2 * size + 100)
            assert is_lost(region, 2 * size)  # the rest of the page reads as zeros
            assert is_lost(region, 3 * size)
            assert is_lost(region, 3 * size)  # and stays lost
            assert not is_lost(region, size)
            assert [state.name for state in states(handler, region)] == [
                "CLEAN",
                "CLEAN",
                "POISONED",
                "POISONED",
            ]
            assert region.read(0, 2 * size) == data[: 2 * size]
            assert handler.stats().poisoned_pages == 2
            expect_failure(handler, region.start + 2 * size, size, 2)
            assert is_lost(region, 2 * size)


@pytest.mark.parametrize("name", memory_params())
def test_truncated_file(name: str) -> None:
    run_child(truncated, name, MISSING, False)


@pytest.mark.parametrize("protect_first", [False, True], ids=["", "protected-first"])
@pytest.mark.parametrize("name", memory_params())
def test_truncated_file_with_wp(name: str, protect_first: bool) -> None:
    run_child(truncated, name, MISSING | WP, protect_first)


def truncated_sigbus(driver: Driver, name: str, mode: int, protect: bool) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(2)
        with file_of(content(region.length)) as file:
            serve_file(handler, region, file, RegisterMode(mode))
            if protect:
                handler.writeprotect(region)
            handler.start()
            file.truncate(0)
            print("touching", flush=True)
            print("read", peek(region, 0, 8))
            os._exit(3)


@pytest.mark.crossing
@both_drivers
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("mode", [MISSING, MISSING | WP], ids=["missing", "missing-wp"])
def test_truncated_file_is_sigbus(driver: Driver, name: str, mode: RegisterMode) -> None:
    protect = bool(mode & WP)
    died = run_child(truncated_sigbus, driver, name, mode, protect, expect=-signal.SIGBUS)
    assert died.stdout == "touching\n"


def truncated_minor(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(2)
        region.fill(1)
        region.madvise(mmap.MADV_DONTNEED)
        with file_of(content(region.length)) as file:
            serve_file(handler, region, file, MINOR)
            handler.start()
            file.truncate(0)
            print("touching", flush=True)
            print("read", peek(region, 0, 8))
            os._exit(3)


@both_drivers
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_truncated_file_of_minor_faults_is_sigbus(driver: Driver, name: str) -> None:
    died = run_child(truncated_minor, driver, name, expect=-signal.SIGBUS)
    assert died.stdout == "touching\n"


def two_threads(name: str) -> None:
    """Two threads touch a page that is lost: the second message does not undo the poison."""
    with serving("native", name) as (handler, memory):
        region = memory.pages(1)
        with file_of(content(region.length)) as file:
            serve_file(handler, region, file, MISSING)
            lost: list[bool] = []
            threads = [threading.Thread(target=lambda: lost.append(is_lost(region))) for _ in "ab"]
            for thread in threads:
                thread.start()
            wait_for_stalled(handler.uffd, 2)
            file.truncate(0)
            handler.start()
            for thread in threads:
                thread.join()
            assert lost == [True, True]
            assert states(handler, region) == [PageState.POISONED]
            assert is_lost(region)
            expect_failure(handler, region.start, memory.page_size, 1)


@pytest.mark.parametrize("name", memory_params())
def test_two_threads_on_a_lost_page(name: str) -> None:
    run_child(two_threads, name)


def populate_truncated(driver: Driver) -> None:
    """The pages that the file still has are filled, and the error tells how many."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(16)
        data = content(region.length)
        with file_of(data) as file:
            serve_file(handler, region, file, MISSING)
            handler.start()
            file.truncate(8 * PAGE)
            with pytest.raises(UffdOSError) as caught:
                handler.populate(region)
            error = caught.value
            assert error.errno == errno.ENODATA
            assert error.data["completed"] == 8 * PAGE
            assert region.read(0, 8 * PAGE) == data[: 8 * PAGE]
            file.seek(8 * PAGE)
            file.write(data[8 * PAGE :])  # the file has all of it again
            assert handler.populate(region) == 8 * PAGE
            assert region.read() == data


test_populate_of_a_truncated_file = with_both_drivers(populate_truncated)


def source_protected() -> None:
    """A source buffer that became unreadable is EFAULT, and its pages are poisoned."""
    with serving("native", "anon") as (handler, memory):
        region, source = memory.pages(2), memory.pages(2)
        handler.serve(region, BufferSource(source.memoryview()))
        libc = ctypes.CDLL(None, use_errno=True)
        start, length = ctypes.c_void_p(source.start), ctypes.c_size_t(source.length)
        assert libc.mprotect(start, length, PROT_NONE) == 0
        handler.start()
        assert is_lost(region)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        error = caught.value
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.EFAULT
        assert error.start == region.start
        gc.collect()  # the source has a view of its region


def test_source_that_cannot_be_read() -> None:
    run_child(source_protected)


# stall


def stall(name: str) -> None:
    with serving("native", name, on_error="stall") as (handler, memory):
        region = memory.pages(2)
        size = memory.page_size
        with file_of(content(region.length)) as file:
            serve_file(handler, region, file, MISSING)
            handler.start()
            file.truncate(size)
            lost: list[bool] = []
            thread = threading.Thread(target=lambda: lost.append(is_lost(region, size)))
            thread.start()
            wait_until(lambda: handler.stats().failed == 1, "the page is given up")
            wait_for_stalled(handler.uffd, 1)
            assert lost == []
            assert not is_lost(region)  # the others are still served
            assert states(handler, region)[1] is PageState.ABSENT
            expect_failure(handler, region.start + size, size, 1)
            thread.join()
            assert lost == [True]


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_stall(name: str) -> None:
    run_child(stall, name)


def stall_sigbus() -> None:
    with serving("native", "anon", on_error="stall") as (handler, memory):
        region = memory.pages(1)
        with file_of(content(PAGE)) as file:
            serve_file(handler, region, file, MISSING)
            handler.start()
            file.truncate(0)
            thread = threading.Thread(target=lambda: print("read", peek(region, 0, 8)))
            thread.start()
            wait_until(lambda: handler.stats().failed == 1, "the page is given up")
            wait_for_stalled(handler.uffd, 1)
            print("stopping", flush=True)
            with contextlib.suppress(HandlerError):
                handler.stop()
            thread.join()
            os._exit(3)


def test_stop_ends_a_stalled_thread_by_sigbus() -> None:
    assert run_child(stall_sigbus, expect=-signal.SIGBUS).stdout == "stopping\n"


# kill


def kill(driver: Driver) -> None:
    with serving(driver, "anon", on_error="kill") as (handler, memory):
        region = memory.pages(1)
        with file_of(content(PAGE)) as file:
            serve_file(handler, region, file, MISSING)
            handler.start()
            file.truncate(0)
            print("touching", flush=True)
            print("read", peek(region, 0, 8))
            os._exit(3)


@both_drivers
def test_kill(driver: Driver) -> None:
    assert run_child(kill, driver, expect=-signal.SIGKILL).stdout == "touching\n"


# Deferred, and retried


@contextlib.contextmanager
def sparse_region(folder: str) -> Iterator[Region]:
    """Four pages of a file without memory yet."""
    with open(f"{folder}/region", "wb+", buffering=0) as file:
        file.truncate(4 * PAGE)
        with Region.file(file, 4 * PAGE) as region:
            yield region


def full_tmpfs(driver: Driver) -> None:
    """A fault waits while there is no memory for its page, and is then resolved."""
    with (
        mounted("tmpfs", size="32k") as folder,
        serving(driver, "anon") as (handler, _),
        sparse_region(folder) as region,
    ):
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        filler = os.open(f"{folder}/filler", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(filler, 0, 8 * PAGE)
        read: list[bytes] = []
        thread = threading.Thread(target=lambda: read.append(region.read()))
        thread.start()
        wait_until(lambda: handler.stats().retried > 2, "the fault is tried again")
        assert read == []
        assert handler.stats().filled_pages == 0
        os.ftruncate(filler, 0)
        os.close(filler)
        thread.join()
        assert read == [data]
        handler.stop()
        stats = handler.stats()
        assert stats.deferred >= 1
        assert (stats.faults["missing"], stats.filled_pages, stats.failed) == (4, 4, 0)


@needs_privilege()
@both_drivers
def test_retry_without_memory(driver: Driver) -> None:
    run_child(full_tmpfs, driver)


def full_tmpfs_for_good() -> None:
    """After the limit on_error applies to the page."""
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.05
    with (
        mounted("tmpfs", size="32k") as folder,
        serving("native", "anon") as (handler, _),
        sparse_region(folder) as region,
    ):
        handler.serve(region, BufferSource(content(region.length)))
        handler.start()
        filler = os.open(f"{folder}/filler", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(filler, 0, 8 * PAGE)
        assert is_lost(region, PAGE, PAGE)
        os.close(filler)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        error = caught.value
        assert error.start == region.start + PAGE
        assert is_lost(region, PAGE, PAGE)


@needs_privilege()
def test_retry_limit() -> None:
    run_child(full_tmpfs_for_good)


@contextlib.contextmanager
def unreserved_huge_pages(pages: int, *, have: int, shared: bool = True) -> Iterator[Region]:
    """Huge pages of a file in a mount that limits how many exist at a time."""
    reserve_nothing = 0x4000  # MAP_NORESERVE
    with (
        mounted("hugetlbfs", pagesize="2M", size=str(have * HUGE_PAGE)) as folder,
        open(f"{folder}/region", "wb+", buffering=0) as file,
    ):
        file.truncate(pages * HUGE_PAGE)
        start = _memory.mmap(
            pages * HUGE_PAGE,
            mmap.PROT_READ | mmap.PROT_WRITE,
            (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | reserve_nothing,
            file.fileno(),
        )
        try:
            yield Region.at(start, pages * HUGE_PAGE, HUGE_PAGE)
        finally:
            _memory.munmap(start, pages * HUGE_PAGE)


def no_huge_page(driver: Literal["native", "inline", "thread"]) -> None:
    """If no huge page is free Linux 6.18 says EEXIST: the fault waits and never gets zeros."""
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        unreserved_huge_pages(3, have=1) as region,
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        data = content(region.length)
        source = BufferSource(data)
        handler.serve(region, CallableSource(source.read) if driver == "thread" else source)
        handler.start()
        assert region.read(HUGE_PAGE, 8) == data[HUGE_PAGE:][:8]
        with pytest.raises(UffdOSError, match="hugetlbfs mount of") as caught:
            handler.populate(region)
        assert caught.value.errno == errno.ENOMEM
        assert (caught.value.start, caught.value.data["completed"]) == (region.start, 0)
        assert states(handler, region) == [ABSENT, CLEAN, ABSENT]
        read: list[bytes] = []
        thread = threading.Thread(target=lambda: read.append(region.read(0, HUGE_PAGE)))
        thread.start()
        wait_until(lambda: handler.stats().retried > 0, "the fault is tried again")
        assert read == []
        assert handler.stats().messages < 100
        _memory.madvise(region.start + HUGE_PAGE, HUGE_PAGE, MADV_REMOVE)
        thread.join()
        assert read == [data[:HUGE_PAGE]]
        failed = driver == "thread"  # stop() also reports what a worker could not fill
        assert bool(handler.stats().failed) == failed
        with (
            pytest.raises(HandlerError, match="hugetlbfs mount of")
            if failed
            else contextlib.nullcontext()
        ):
            handler.stop()


def fills_what_it_can(driver: AnyDriver, shared: bool) -> None:
    """`completed` counts what was filled before the huge pages ran out."""
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.2
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        unreserved_huge_pages(3, have=2, shared=shared) as region,
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        data = content(region.length)
        asks = driver in ("thread", "process")
        handler.serve(region, Data(data) if asks else BufferSource(data))
        with pytest.raises(
            UffdOSError, match=r"no huge page was free .*hugetlbfs mount of .* 0 of its 2"
        ) as caught:
            handler.populate(region)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.start == region.start + 2 * HUGE_PAGE
        assert caught.value.data["completed"] == 2 * HUGE_PAGE
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT]
        assert handler.populate(region, 0, 2 * HUGE_PAGE) == 0
        assert region.read(0, 2 * HUGE_PAGE) == data[: 2 * HUGE_PAGE]
        with pytest.raises(HandlerError) if asks else contextlib.nullcontext():
            handler.stop()


@pytest.mark.crossing
@needs_privilege()
@needs_hugepages(2)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
@pytest.mark.parametrize("driver", ["native", "inline", "thread", "process"])
def test_populate_without_huge_pages(driver: AnyDriver, shared: bool) -> None:
    run_child(fills_what_it_can, driver, shared)


def fills_from_here_what_it_can(driver: AnyDriver) -> None:
    """`Handler.fill` says what was full, as `populate` does."""
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.2
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        unreserved_huge_pages(3, have=2) as region,
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        data = content(region.length)
        handler.serve(region, BufferSource(data) if driver == "native" else ZeroSource())
        with pytest.raises(
            UffdOSError, match=r"no huge page was free .*hugetlbfs mount of .* 0 of its 2"
        ) as caught:
            handler.fill(region, 0, data)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.start == region.start + 2 * HUGE_PAGE
        assert caught.value.data["completed"] == 2 * HUGE_PAGE
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT]


@needs_privilege()
@needs_hugepages(2)
@pytest.mark.parametrize("driver", ["native", "inline", "thread", "process"])
def test_fill_without_huge_pages(driver: AnyDriver) -> None:
    run_child(fills_from_here_what_it_can, driver)


@needs_privilege()
@needs_hugepages(1)
@pytest.mark.parametrize("driver", ["native", "inline", "thread"])
def test_retry_without_huge_pages(driver: Literal["native", "inline", "thread"]) -> None:
    run_child(no_huge_page, driver)


def no_huge_page_for_good() -> None:
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.05
    with unreserved_huge_pages(2, have=1) as region, handler_of("native") as handler:
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert region.read(0, 8) == data[:8]
        assert is_lost(region, HUGE_PAGE, 1)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        assert caught.value.start == region.start + HUGE_PAGE
        assert "huge page" in str(caught.value)
        assert "0 of its 1 pages left" in str(caught.value)
        assert is_lost(region, HUGE_PAGE, 1)
        assert region.read(0, HUGE_PAGE) == data[:HUGE_PAGE]


@needs_privilege()
@needs_hugepages(1)
def test_retry_limit_without_huge_pages() -> None:
    run_child(no_huge_page_for_good)


def worker_waits(driver: AnyDriver) -> None:
    """A source that has answered is not called stalled while its worker waits for a huge page."""
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 1.0
    with (
        unreserved_huge_pages(2, have=1) as region,
        Region.anonymous(PAGE) as behind,
        Userfaultfd() as uffd,
        Handler(uffd, driver=driver, stall_timeout_s=0.2) as handler,
    ):
        data = content(region.length)
        handler.serve(region, Data(data))
        handler.serve(behind, Data(data[:PAGE]))
        assert region.read(0, 8) == data[:8]
        waits = Task(region.touch, HUGE_PAGE, 1)
        wait_until(lambda: handler.stats().retried > 0, "the page is tried again")
        # The only worker is busy, but no source is.
        assert behind.read() == data[:PAGE]
        with pytest.raises(PagePoisonedError):
            waits.result()
        assert handler.stats().stalled_requests == 0
        with pytest.raises(HandlerError, match="0 of its 1 pages left"):
            handler.stop()


@needs_privilege()
@needs_hugepages(1)
@pytest.mark.parametrize("driver", ["thread", "process"])
def test_a_worker_that_waits_for_a_huge_page(driver: AnyDriver) -> None:
    ended = run_child(worker_waits, driver, budget_s=30)
    assert "no huge page is free" in ended.stderr
    assert "has not answered" not in ended.stderr


def no_huge_page_inline() -> None:
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.05
    with unreserved_huge_pages(2, have=1) as region, handler_of("inline") as handler:
        handler.serve(region, BufferSource(content(region.length)))
        handler.start()
        region.read(0, 1)
        print("touching", flush=True)
        peek(region, HUGE_PAGE)


@needs_privilege()
@needs_hugepages(1)
def test_retry_limit_without_huge_pages_is_sigbus_inline() -> None:
    assert run_child(no_huge_page_inline, expect=-signal.SIGBUS).stdout == "touching\n"


# What remains after stop()


def stop_seals(driver: Driver, name: str) -> None:
    """Loaded pages stay; pages that were never loaded are lost, or zeros with a ZeroSource."""
    with serving(driver, name) as (handler, memory):
        loaded, zero, protected = memory.pages(3), memory.pages(2), memory.pages(2)
        size, data = memory.page_size, content(loaded.length)
        handler.serve(loaded, BufferSource(data))
        handler.serve(zero, ZeroSource())
        handler.serve(protected, BufferSource(data[: 2 * size]), mode=MISSING | WP)
        handler.start()
        loaded.write(size, b"x")
        zero.write(0, b"y")
        protected.read(0, 1)
        handler.writeprotect(protected)
        handler.stop()
        assert [is_lost(loaded, page * size) for page in range(3)] == [True, False, True]
        assert loaded.read(size, size) == b"x" + data[size + 1 : 2 * size]
        assert zero.read() == b"y" + bytes(zero.length - 1)
        assert [is_lost(protected, page * size) for page in range(2)] == [False, True]
        protected.write(0, b"free")
        assert protected.read(0, size) == b"free" + data[4:size]
        assert handler.stats().poisoned_pages == 3


test_stop_poisons_what_was_never_loaded = everywhere(stop_seals)


def stop_sigbus(driver: Driver, how: str) -> None:
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(2)
        handler.serve(region, BufferSource(content(region.length)))
        handler.start()
        assert region.read(0, 1) == content(region.length)[:1]
        if how == "stop":
            handler.stop()
        elif how == "unserve":
            handler.unserve(region)
        else:
            handler.uffd.close()
        print("touching", flush=True)
        print("read", peek(region, PAGE, 8))
        os._exit(3)


@both_drivers
@pytest.mark.parametrize("how", ["stop", "unserve", "close"])
def test_read_after_stop_is_sigbus(driver: Driver, how: str) -> None:
    died = run_child(stop_sigbus, driver, how, expect=-signal.SIGBUS)
    assert died.stdout == "touching\n"


def never_started(name: str) -> None:
    """Threads that wait for a handler which never starts get no zeros from its stop()."""
    with serving("native", name) as (handler, memory):
        region = memory.pages(2)
        handler.serve(region, BufferSource(content(region.length)))
        lost: list[bool] = []

        def ask(at: int) -> None:
            lost.append(is_lost(region, at))

        threads = [threading.Thread(target=ask, args=(at,)) for at in (0, memory.page_size)]
        for thread in threads:
            thread.start()
        wait_for_stalled(handler.uffd, 2)
        handler.stop()
        for thread in threads:
            thread.join()
        assert lost == [True, True]


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_stop_without_start(name: str) -> None:
    run_child(never_started, name)


def stop_with_waiters(name: str, drain: bool) -> None:
    """A source whose own pages are missing blocks the native thread while stop() begins."""
    with (
        serving("native", name) as (handler, memory),
        Userfaultfd() as slow,
        Region.anonymous(4 * memory.page_size) as source,
    ):
        size = memory.page_size
        region = memory.pages(3)
        data = content(region.length)
        slow.register(source.start, source.length)
        handler.serve(region, BufferSource(source.memoryview()[: region.length]))
        handler.start()
        results: dict[int, bool | bytes] = {}

        def first() -> None:
            results[0] = region.read(0, size)

        def second() -> None:
            results[1] = is_lost(region, size)

        def third() -> None:
            results[2] = is_lost(region, size)

        waiting = [threading.Thread(target=first)]
        waiting[0].start()
        wait_for_stalled(slow, 1)  # the native thread, in the middle of page 0
        for function in (second, third):
            waiting.append(threading.Thread(target=function))
            waiting[-1].start()
        wait_for_stalled(handler.uffd, 3)
        stopper = threading.Thread(target=lambda: handler.stop(drain=drain))
        stopper.start()
        wait_in_system_call(ending_thread(), CLOCK_NANOSLEEP)
        slow.copy(source.start, data)
        for thread in (*waiting, stopper):
            thread.join()
        assert results == {0: data[:size], 1: not drain, 2: not drain}
        assert is_lost(region, 2 * size)  # no thread asked for it
        assert is_lost(region, size) is not drain
        assert region.read(0, size) == data[:size]
        gc.collect()  # the source has a view of its region


@needs_kernel_faults()
@pytest.mark.parametrize("drain", [True, False], ids=["drain", "no-drain"])
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_stop_with_waiting_threads(name: str, drain: bool) -> None:
    run_child(stop_with_waiters, name, drain)
