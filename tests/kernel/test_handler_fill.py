"""Handler.fill: content that comes beside faults, through every driver and into every memory."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.sources import PROMISED, Promised
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._serving import (
    content,
    is_lost,
    run_threads,
    states,
    wait_for_stalled,
    wait_until,
)
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DIRTY,
    DRIVERS,
    MINOR,
    MISSING,
    PAGES,
    PYTHON,
    TRACKING,
    WP,
    Case,
    Driver,
    added,
    filling,
    handling,
    run_cases,
)


def promise(offset: int, length: int) -> Promised:
    """A source whose content comes by fill()."""
    del offset, length
    return PROMISED


def from_memory(handler: Handler, name: str) -> None:
    """From bytes, a part of an array, another region: absent pages only."""
    with filling(handler, name) as region, Region.anonymous(region.length) as other:
        before = handler.stats()
        size, data = region.page_size, content(region.length)
        region.write(size, b"written first")
        other.write(0, data)
        assert handler.fill(region, 0, data[: 2 * size]) == size
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT, ABSENT]
        array: Any = np.frombuffer(data, np.uint8)
        assert handler.fill(region, 2 * size, array[2 * size :], size) == size
        assert handler.fill(region, 0, other) == size
        assert handler.fill(region, 0, other) == 0
        first = b"written first".ljust(size, b"\0")
        assert region.read(0, region.length) == data[:size] + first + data[2 * size :]
        assert added(handler, before, "filled_pages") == PAGES


def from_descriptors(handler: Handler, name: str) -> None:
    """From a place of a file, from a stream that comes in pieces, and from one that ends."""
    with filling(handler, name) as region:
        size, data = region.page_size, content(region.length)
        ours, theirs = socket.socketpair()
        with open(os.memfd_create("data"), "w+b") as file, ours, theirs:
            file.write(b"head" + data)
            file.flush()
            assert handler.fill(region, size, file, size, data_offset=4 + size) == size
            theirs.setblocking(False)

            def send() -> None:
                for at in range(0, size, 1000):
                    ours.sendall(data[at : min(at + 1000, size)])
                ours.sendall(data[2 * size : 3 * size] + b"half a page")
                ours.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=send)
            thread.start()
            assert handler.fill(region, 0, theirs, size) == size
            with pytest.raises(UffdOSError) as ended:
                handler.fill(region, 2 * size, theirs.fileno())
            thread.join()
            assert ended.value.errno == errno.ENODATA
            # Small pages are read together, so that none of them was filled.
            done = size if size > 4096 else 0
            assert ended.value.completed == done  # type: ignore[attr-defined]
            assert ended.value.start == region.start + 2 * size + done
        assert region.read(0, 2 * size) == data[: 2 * size]
        assert states(handler, region)[3] is ABSENT


def protection(handler: Handler, name: str) -> None:
    """With WP the pages arrive protected or, if that is not wanted, written."""
    with filling(handler, name, mode=MISSING | WP) as region:
        size, data = region.page_size, content(region.length)
        assert handler.fill(region, 0, data[:size]) == size
        assert handler.fill(region, size, data[size : 2 * size], keep_protected=True) == size
        for page, off in ((2, False), (3, np.bool_(False))):
            part = data[page * size : (page + 1) * size]
            filled = handler.fill(region, page * size, part, keep_protected=off)  # type: ignore[arg-type]
            assert filled == size
        assert states(handler, region) == [CLEAN, CLEAN, DIRTY, DIRTY]
        region.write(0, b"new")
        assert states(handler, region) == [DIRTY, CLEAN, DIRTY, DIRTY]
        assert region.read(size, 3 * size) == data[size:]
        faults = handler.stats().faults["wp"]
        region.write(2 * size, b"new")
        assert handler.stats().faults["wp"] == faults


def beside_faults(handler: Handler, name: str) -> None:
    """Threads fault while all is pushed: each page is filled once, with what it must hold."""
    with filling(handler, name) as region:
        before, size = handler.stats(), region.page_size

        def push() -> None:
            for page in range(PAGES):
                handler.fill(region, page * size, bytes(size))

        run_threads(push, push, lambda: region.touch(), lambda: region.touch())
        assert region.read(0, region.length) == bytes(region.length)
        assert added(handler, before, "filled_pages") == PAGES
        assert added(handler, before, "failed") == 0
        assert states(handler, region) == [CLEAN] * PAGES


def dropped(handler: Handler, name: str) -> None:
    """What the owner has dropped is zeros, whatever comes later."""
    if handler.driver == "inline":
        return
    with filling(handler, name) as region:
        size, data = region.page_size, content(region.length)
        assert handler.fill(region, 0, data) == region.length
        region.madvise(9 if region.shared else 4, 0, size)  # MADV_REMOVE, MADV_DONTNEED
        assert handler.fill(region, 0, data) == 0
        assert region.read(0, 2 * size) == bytes(size) + data[size : 2 * size]


def minor(handler: Handler, name: str) -> None:
    """MINOR without MISSING: the content goes through the page cache."""
    if name not in ("shmem", "hugetlb"):
        return
    with filling(handler, name, mode=MINOR | WP) as region:
        size, data = region.page_size, content(region.length)
        assert handler.fill(region, size, data[size:]) == 3 * size
        assert states(handler, region) == [ABSENT, CLEAN, CLEAN, CLEAN]
        assert region.read(0, region.length) == bytes(size) + data[size:]
        with region.alias() as alias:
            assert alias.read(size, size) == data[size : 2 * size]


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (from_memory, from_descriptors, protection, beside_faults, dropped, minor)
}


def check(name: str) -> None:
    for driver in DRIVERS:
        with handling(driver) as handler:
            run_cases(CASES, handler, name)


@pytest.mark.parametrize("name", memory_params())
@needs(TRACKING | Feature.EVENT_REMOVE | Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS)
def test_fill(name: str) -> None:
    run_child(check, name, budget_s=60)


# A source in Python that has asked somebody else


def promised(handler: Handler, name: str) -> None:
    """Threads wait until the pages come; one that is dropped does not."""
    before = handler.stats()
    with filling(handler, name, CallableSource(promise)) as region:
        size, data = region.page_size, content(region.length)
        seen: list[bytes] = []
        threads = [
            threading.Thread(target=lambda at=at: seen.append(region.read(at, 8)))
            for at in (0, 0, size, 2 * size)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: added(handler, before, "requests") == 3, "three pages are asked for")
        region.madvise(9 if region.shared else 4, 2 * size, size)
        threads[3].join()
        assert seen == [bytes(8)]
        with open(os.memfd_create("data"), "w+b") as file:
            file.write(data)
            file.flush()
            assert handler.fill(region, 0, file, data_offset=0) == 3 * size
        for thread in threads:
            thread.join()
        assert sorted(seen) == sorted([data[:8], data[:8], data[size : size + 8], bytes(8)])
        assert added(handler, before, "failed") == 0


def populated(handler: Handler, name: str) -> None:
    """populate() asks the source for all, and returns when all has come."""
    before = handler.stats()
    with filling(handler, name, CallableSource(promise)) as region:
        data = content(region.length)
        filled: list[int] = []
        thread = threading.Thread(target=lambda: filled.append(handler.populate(region)))
        thread.start()
        wait_until(lambda: added(handler, before, "requests") > 0, "pages are asked for")
        handler.fill(region, 0, data)
        thread.join()
        assert region.read(0, region.length) == data
        assert added(handler, before, "failed") == 0


PROMISES: dict[str, Case] = {"promised": promised, "populated": populated}


def broken(driver: Driver, name: str) -> None:
    """What was promised and does not come is lost when the time is over, and said."""
    with (
        pytest.raises(HandlerError) as failed,
        handling(driver, stall_timeout_s=0.2) as handler,
        filling(handler, name, CallableSource(promise)) as region,
    ):
        assert is_lost(region)
        assert handler.stats().stalled_requests == 1
        assert handler.fill(region, 0, content(region.length)) == region.length - region.page_size
    assert failed.value.start is not None
    assert isinstance(failed.value.__cause__, TimeoutError)


def check_promises(name: str) -> None:
    for driver in PYTHON:
        with handling(driver, stall_timeout_s=60.0) as handler:
            run_cases(PROMISES, handler, name)
    broken("thread", name)


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb-private"))
@needs(TRACKING | Feature.EVENT_REMOVE | Feature.POISON)
def test_promised_pages(name: str) -> None:
    run_child(check_promises, name, budget_s=60)


# Bad arguments


def refused() -> None:
    with (
        handling("native") as handler,
        filling(handler, "anon") as region,
        Region.anonymous(4096) as small,
    ):
        size, fd = region.page_size, os.memfd_create("data")
        data = bytes(size)
        bad: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any]]] = [
            (ValueError, (small, 0, data), {}),
            (ValueError, (region, 1, data), {}),
            (ValueError, (region, 0, data[1:]), {}),
            (ValueError, (region, 0, data, 2 * size), {}),
            (ValueError, (region, 3 * size, data * 2), {}),
            (ValueError, (region, 0, b""), {}),
            (ValueError, (region, 0, data), {"data_offset": 0}),
            (ValueError, (region, 0, data), {"keep_protected": True}),
            (ValueError, (region, 0, fd, size), {"data_offset": -1}),
            (ValueError, (region, 0, region), {}),
            (ValueError, (region, 0, -1, size), {}),
            (TypeError, (region, 0, "text"), {}),
            (TypeError, (region, 0, True, size), {}),
            (TypeError, (region, 0, None), {}),
            (TypeError, (region, 0, bytes), {}),
            (OSError, (region, 0, 1 << 20, size), {}),
        ]
        for kind, args, options in bad:
            with pytest.raises(kind):
                handler.fill(*args, **options)
        with pytest.raises(UffdOSError) as unreadable:
            handler.fill(region, 0, SimpleNamespace(start=1 << 20, length=size))
        assert unreadable.value.errno == errno.EFAULT
        os.close(fd)
        assert states(handler, region) == [ABSENT] * PAGES


@needs(TRACKING)
def test_refuses_bad_arguments() -> None:
    run_child(refused)


def without_absent_pages() -> None:
    with (
        Userfaultfd(features=TRACKING) as uffd,
        Region.anonymous(4096) as region,
        Handler(uffd) as handler,
    ):
        region.fill(1)
        handler.serve(region, None, mode=WP)
        with pytest.raises(ValueError, match="WP only"):
            handler.fill(region, 0, bytes(4096))


@needs(TRACKING)
def test_refuses_ranges_whose_pages_are_never_absent() -> None:
    run_child(without_absent_pages)


def beside_a_file_source() -> None:
    """The pages that were pushed do not come from the file, the others do."""
    with open(os.memfd_create("image"), "w+b") as file:
        file.write(b"f" * 4096 * PAGES)
        file.flush()
        with (
            FileSource(file) as source,
            handling("native") as handler,
            filling(handler, "anon", source) as region,
        ):
            handler.fill(region, 4096, b"p" * 4096)
            handler.populate(region)
            assert region.read(0, 3 * 4096) == b"f" * 4096 + b"p" * 4096 + b"f" * 4096


@needs(TRACKING)
def test_beside_a_file() -> None:
    run_child(beside_a_file_source)


def by_pages(handler: Handler, pages: int) -> int:
    """How many calls Python makes to fill so many pages from a descriptor."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with (
        Region.anonymous(pages * 4096) as region,
        open(os.memfd_create("data"), "w+b") as file,
    ):
        file.write(content(pages * 4096))
        file.flush()
        handler.serve(region, ZeroSource())
        sys.setprofile(count)
        try:
            assert handler.fill(region, 0, file, data_offset=0) == pages * 4096
        finally:
            sys.setprofile(None)
        assert region.read() == content(pages * 4096)
        handler.unserve(region)
    return calls


def no_calls_by_page() -> None:
    """Python does as much for 256 pages as for one: the descriptor is read in C."""
    for driver in DRIVERS:
        with handling(driver) as handler:
            by_pages(handler, 1)
            # Not exactly: how often a call waits for another thread varies.
            assert by_pages(handler, 256) < by_pages(handler, 1) + 128


@needs(TRACKING)
def test_a_descriptor_is_read_in_c() -> None:
    run_child(no_calls_by_page, budget_s=20)


def from_data_that_block() -> None:
    """Data whose second page comes late: no page of the region waits for it meanwhile."""
    for driver in DRIVERS:
        with (
            Userfaultfd() as other,
            Region.anonymous(2 * 4096) as data,
            handling(driver) as handler,
            filling(handler, "anon") as region,
        ):
            other.register(data)
            other.fill_copy(data.start, b"d" * 4096)
            filled: list[int] = []
            fill = partial(handler.fill, region, 0, data)
            thread = threading.Thread(target=lambda fill=fill, to=filled: to.append(fill()))
            thread.start()
            wait_for_stalled(other, 1)
            # As a source has it.
            assert region.read(4096, 1) != b"l"
            other.fill_copy(data.start + 4096, b"l" * 4096)
            thread.join()
            assert filled == [4096]
            assert region.read(0, 1) == b"d"
            other.unregister(data)


@needs(TRACKING)
@needs_kernel_faults()
def test_data_that_block() -> None:
    run_child(from_data_that_block)
