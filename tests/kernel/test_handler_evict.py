"""Handler.evict: pages go, and come back from the source; nobody sees zeros or what was before."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    LayoutChangedError,
    PageState,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import memory_params
from tests._rooms import room
from tests.kernel._faults import Task
from tests.kernel._serving import content, run_threads, states, wait_until
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DIRTY,
    DRIVERS,
    MINOR,
    MISSING,
    NEEDED,
    PAGES,
    REMOVED,
    TRACKING,
    WP,
    Case,
    filling,
    handling,
    run_cases,
)

SECONDS = 0.3
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_MLOCK, SYS_MUNLOCK = 149, 150
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2


@contextmanager
def store(handler: Handler, name: str) -> Iterator[tuple[Region, int]]:
    """A region that is served from a file for MISSING and WP; its descriptor may be written."""
    size = 2 << 20 if name.startswith("hugetlb") else 4096
    fd = os.memfd_create("store")
    try:
        os.write(fd, content(PAGES * size))
        with FileSource(fd) as source, filling(handler, name, source, MISSING | WP) as region:
            yield region, fd
    finally:
        os.close(fd)


def to_a_file(handler: Handler, name: str) -> None:
    """What was written is in the file, and comes back from there; what is absent stays so."""
    with store(handler, name) as (region, fd):
        size, data = region.page_size, content(region.length)
        region.write(0, b"new")
        region.read(size, 1)
        assert handler.evict(region, write_back=fd) == 2 * size
        assert states(handler, region) == [ABSENT] * PAGES
        assert list(handler.checkpoint(region).written) == [(0, size, ABSENT)]
        assert os.pread(fd, size, 0) == b"new" + data[3:size]
        assert region.read(0, region.length) == b"new" + data[3:]
        assert states(handler, region) == [CLEAN] * PAGES
        assert handler.evict(region, size, 2 * size, write_back=fd) == 2 * size
        assert states(handler, region) == [CLEAN, ABSENT, ABSENT, CLEAN]
        os.pwrite(fd, b"by others", 2 * size)
        assert region.read(2 * size, 9) == b"by others"


def by_a_function(handler: Handler, name: str) -> None:
    """The function gets all that is there, or what was written only."""
    with store(handler, name) as (region, fd):
        size, data = region.page_size, content(region.length)
        region.write(size, b"new")
        region.read(0, region.length)
        got: dict[int, bytes] = {}

        def write(offset: int, view: memoryview) -> None:
            assert view.readonly
            got[offset] = bytes(view)
            os.pwrite(fd, view, offset)

        assert handler.evict(region, write_back=write, written_only=True) == region.length
        assert got == {size: b"new" + data[size + 3 : 2 * size]}
        assert region.read(size, 4) == b"new" + data[size + 3 : size + 4]
        got.clear()
        region.read(3 * size, 1)
        assert handler.evict(region, write_back=write) == 2 * size
        assert got.keys() == {size, 3 * size}
        assert states(handler, region) == [ABSENT] * PAGES


def the_last_page(handler: Handler, name: str) -> None:
    """The page in which the source ends comes back too; what lies behind the end, from its file."""
    size = 2 << 20 if name.startswith("hugetlb") else 4096
    fd, at = os.memfd_create("store"), (PAGES - 1) * size
    os.write(fd, content(at + 100))
    with FileSource(fd) as source, filling(handler, name, source, MISSING | WP) as region:
        os.pwrite(fd, b"by others", at + 20)
        assert region.read(at + 20, 9) == b"by others"
        region.write(at + 50, b"inside")
        assert handler.evict(region, write_back=lambda at, data: os.pwrite(fd, data[:100], at)) > 0
        assert region.read(at + 50, 6) == b"inside"
        region.write(at + 90, b"across the end")
        assert handler.evict(region, write_back=source) > 0
        assert region.read(at + 90, 15) == b"across the end\0"
        assert os.fstat(fd).st_size == PAGES * size
        assert handler.evict(region, write_back=None) > 0
        os.ftruncate(fd, at + 100)
        assert region.read(at + 90, 15) == b"across the" + bytes(5)
    os.close(fd)
    data = bytearray(content(at + 100))
    with filling(handler, name, BufferSource(data), MISSING) as region:
        region.read(at, 1)
        data[at : at + 3] = b"new"
        assert handler.evict(region, write_back=None) > 0
        assert region.read(at, 3) == b"new"
        assert region.read(at + 100) == bytes(size - 100)


def nothing(handler: Handler, name: str) -> None:
    """None drops what was written, also where writes are not followed."""
    with store(handler, name) as (region, fd):
        region.write(0, b"new")
        assert handler.evict(region, 0, region.page_size, write_back=None) == region.page_size
        assert region.read(0, 8) == content(region.length)[:8]
        with FileSource(fd) as source, filling(handler, name, source) as other:
            other.write(0, b"new")
            assert handler.evict(other, write_back=None) == other.page_size
            assert other.read(0, 8) == content(region.length)[:8]


def written_meanwhile(handler: Handler, name: str) -> None:
    """A page that is written while it is handed over stays, with what was written."""
    with store(handler, name) as (region, _):
        size = region.page_size
        region.write(0, b"first")
        region.write(size, b"other")
        calls: list[int] = []

        def write(offset: int, view: memoryview) -> None:
            calls.append(offset)
            region.write(0, f"call {len(calls)}".encode())

        assert handler.evict(region, write_back=write) == size
        assert states(handler, region) == [DIRTY, ABSENT, ABSENT, ABSENT]
        assert region.read(0, 6) == f"call {len(calls)}".encode()
        # It cannot wait for itself.
        with pytest.raises(HandlerError, match="write_back evicts"):
            handler.evict(region, write_back=lambda *_: handler.evict(region, write_back=print))
        # Others that protect hide a write: then nothing goes.
        calls.clear()

        def protect(offset: int, view: memoryview) -> None:
            region.write(0, b"hidden")
            handler.checkpoint(region)

        assert handler.evict(region, write_back=protect) == 0
        assert region.read(0, 6) == b"hidden"


def fails(handler: Handler, name: str) -> None:
    """What nobody has got stays, and counts as written."""
    with store(handler, name) as (region, fd):
        size = region.page_size
        region.write(size, b"new")
        region.read(2 * size, 1)

        def write(offset: int, view: memoryview) -> None:
            raise KeyError("full")

        with pytest.raises(KeyError):
            handler.evict(region, write_back=write)
        assert states(handler, region) == [ABSENT, DIRTY, CLEAN, ABSENT]
        sealed = os.memfd_create("full", os.MFD_ALLOW_SEALING)
        try:
            LIBC.fcntl(sealed, 1033, 4)  # F_ADD_SEALS, F_SEAL_GROW
            with pytest.raises(UffdOSError) as failed:
                handler.evict(region, write_back=sealed)
        finally:
            os.close(sealed)
        assert failed.value.errno == errno.EPERM
        assert states(handler, region) == [ABSENT, DIRTY, CLEAN, ABSENT]
        assert region.read(size, 3) == b"new"
        assert handler.evict(region, write_back=fd) == 2 * size


def dropped(handler: Handler, name: str) -> None:
    """What its owner has dropped is zeros, for the source too; without one it stays that."""
    if handler.driver == "inline":
        return
    with store(handler, name) as (region, fd):
        size = region.page_size
        region.read(0, 2 * size)
        region.madvise(9 if region.shared else 4, 0, size)
        assert handler.evict(region, write_back=None) == size
        assert states(handler, region) == [REMOVED, ABSENT, ABSENT, ABSENT]
        # Touched since, they are there, and stay zeros nevertheless.
        assert region.read(0, 1) == b"\0"
        assert handler.evict(region, write_back=None) == size
        assert states(handler, region) == [REMOVED, ABSENT, ABSENT, ABSENT]
        assert region.read(0, size) == bytes(size)
        assert handler.evict(region, write_back=fd, written_only=True) == size
        assert states(handler, region) == [ABSENT] * PAGES
        assert os.pread(fd, size, 0) == region.read(0, size) == bytes(size)
        # Written since, it is a page that was written.
        region.madvise(9 if region.shared else 4, 0, size)
        os.pwrite(fd, b"source", 0)
        region.write(0, b"new")
        assert states(handler, region)[0] is DIRTY
        assert handler.evict(region, 0, size, write_back=None) == size
        assert region.read(0, 6) == b"source"
        with FileSource(fd) as source, filling(handler, name, source) as other:
            other.read(0, 1)
            other.madvise(9 if other.shared else 4, 0, size)
            other.write(0, b"new")
            assert handler.evict(other, write_back=None) == size
            assert other.read(0, size) == bytes(size)


def dropped_unseen(handler: Handler, name: str) -> None:
    """The inline driver is not told: what is not there cannot be written back, and stays."""
    if handler.driver != "inline":
        return
    with store(handler, name) as (region, fd):
        size, data = region.page_size, content(region.length)
        region.read(0, region.length)
        region.madvise(9 if region.shared else 4, size, size)
        assert handler.evict(region, write_back=fd) == 3 * size
        assert region.read(0, region.length) == data[:size] + bytes(size) + data[2 * size :]
        region.madvise(9 if region.shared else 4, size, size)
        assert handler.evict(region, write_back=lambda at, view: None) == 3 * size
        assert region.read(size, size) == bytes(size)


def touched_meanwhile(handler: Handler, name: str) -> None:
    """A thread that touches a page while it is dropped waits, and then gets the source's content.

    Its fault is found in flight, so whoever drops the page must wake it.
    """
    if handler.driver == "inline":  # its threads look again and again
        return
    with store(handler, name) as (region, _):
        size, data = region.page_size, content(region.length)
        region.write(0, b"new")
        with holding(Point.EVICT_DROPPED) as dropped:
            evicting = Task(lambda: handler.evict(region, write_back=None))
            dropped.wait()
            before = handler.stats().messages
            reading = Task(region.read, 0, size)
            wait_until(lambda: handler.stats().messages > before, "the fault has been read")
            assert states(handler, region)[0] is PageState.IN_FLIGHT
        assert reading.result() == data[:size]
        assert evicting.result() == size


def dropped_meanwhile(handler: Handler, name: str) -> None:
    """What its owner drops while other pages are evicted is zeros, not what the file has by now."""
    if handler.driver == "inline":
        return
    with store(handler, name) as (region, fd):
        size, data = region.page_size, content(region.length)
        region.read(0, 1)
        region.read(2 * size, 1)
        with holding(Point.EVICT_DROPPED) as dropped:
            evicting = Task(lambda: handler.evict(region, write_back=fd))
            dropped.wait()
            region.madvise(9 if region.shared else 4, 2 * size, size)
        assert evicting.result() == size
        assert states(handler, region) == [ABSENT, ABSENT, REMOVED, ABSENT]
        assert region.read(0, region.length) == data[: 2 * size] + bytes(size) + data[3 * size :]


def locked(handler: Handler, name: str) -> None:
    """Linux does not drop locked memory, which is said; nothing is lost."""
    with store(handler, name) as (region, fd):
        if region.page_size > 4096:
            return
        region.write(0, b"new")
        # The function of that name does nothing under AddressSanitizer.
        assert LIBC.syscall(SYS_MLOCK, ctypes.c_void_p(region.start), ctypes.c_size_t(4096)) == 0
        with pytest.raises(UffdOSError) as refused:
            handler.evict(region, write_back=None)
        assert (refused.value.errno, refused.value.start) == (errno.EINVAL, region.start)
        assert "munlock" in refused.value.hint
        assert region.read(0, 3) == b"new"
        assert LIBC.syscall(SYS_MUNLOCK, ctypes.c_void_p(region.start), ctypes.c_size_t(4096)) == 0
        assert handler.evict(region, 0, 4096, write_back=fd) == 4096
        assert region.read(0, 3) == b"new"


def the_file_too(handler: Handler, name: str) -> None:
    """Shared memory goes from its file, so that no other mapping keeps the old content."""
    with store(handler, name) as (region, fd):
        if not region.shared:
            return
        with region.alias() as alias:
            region.read(0, region.length)
            assert alias.read(0, 4) == content(4096)[:4]
            assert handler.evict(region, write_back=fd) == region.length
            assert os.fstat(region.fd).st_blocks == 0  # type: ignore[arg-type]
            assert alias.read(0, 4) == bytes(4)


def no_write_is_lost(handler: Handler, name: str) -> None:
    """Threads count in the pages while these are evicted all the time."""
    with store(handler, name) as (region, fd):
        size = region.page_size
        for page in range(PAGES):
            region.write(page * size, bytes(32))
        until = time.monotonic() + SECONDS
        counts = [[0] * PAGES for _ in range(2)]

        def count(thread: int) -> None:
            chance = random.Random(thread)
            while time.monotonic() < until:
                page = chance.randrange(PAGES)
                at = page * size + 8 * thread
                assert int.from_bytes(region.read(at, 8), "little") == counts[thread][page]
                counts[thread][page] += 1
                region.write(at, counts[thread][page].to_bytes(8, "little"))

        def evict() -> None:
            while time.monotonic() < until:
                handler.evict(region, write_back=fd, written_only=True)

        def evict_by_call() -> None:
            while time.monotonic() < until:
                handler.evict(region, write_back=lambda at, view: os.pwrite(fd, view, at))

        run_threads(lambda: count(0), lambda: count(1), evict, evict_by_call)
        for thread in range(2):
            for page in range(PAGES):
                found = int.from_bytes(region.read(page * size + 8 * thread, 8), "little")
                assert found == counts[thread][page]


def neither_zeros_nor_old(handler: Handler, name: str) -> None:
    """A reader sees only what the source has had since the page went, never zeros."""
    with store(handler, name) as (region, fd):
        os.pwrite(fd, (1).to_bytes(8, "little"), 0)
        until = time.monotonic() + SECONDS

        def change() -> None:
            number = 1
            while time.monotonic() < until:
                number += 1
                os.pwrite(fd, number.to_bytes(8, "little"), 0)
                handler.evict(region, 0, region.page_size, write_back=None)
                assert int.from_bytes(region.read(0, 8), "little") == number

        def look() -> None:
            last = 1
            while time.monotonic() < until:
                found = int.from_bytes(region.read(0, 8), "little")
                assert found >= last
                last = found

        run_threads(change, look, look)


@needs(TRACKING)
def test_what_was_mapped_in_their_place_stays() -> None:
    """Without events the handler is not told that its memory has gone."""
    run_child(foreign_memory)


def foreign_memory() -> None:
    size = PAGES * 4096
    for name in ("anon", "shmem"):
        for driver in ("native", "inline", "thread"):
            features = TRACKING | (Feature.SIGBUS if driver == "inline" else Feature(0))
            with (
                Userfaultfd(features=features) as uffd,
                Region.memfd(size) if name == "shmem" else Region.anonymous(size) as region,
                Region.memfd(4096) as other,
                Handler(uffd, driver=driver) as handler,
            ):
                handler.serve(region, content(size), mode=MISSING | WP)
                handler.populate(region)
                # Split by mprotect(2), the rest is still the handler's.
                LIBC.mprotect(ctypes.c_void_p(region.start), 4096, mmap.PROT_READ)
                place = region.start + 2 * 4096
                kind = mmap.MAP_SHARED if name == "shmem" else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                LIBC.mmap.restype = ctypes.c_void_p
                found = LIBC.mmap(
                    ctypes.c_void_p(place),
                    ctypes.c_size_t(4096),
                    mmap.PROT_READ | mmap.PROT_WRITE,
                    kind | MAP_FIXED,
                    other.fd if name == "shmem" else -1,
                    ctypes.c_long(0),
                )
                assert found == place
                region.write(2 * 4096, b"of others")
                for written_back in (None, lambda *_: None):
                    with pytest.raises(LayoutChangedError):
                        handler.evict(region, write_back=written_back)
                    assert region.read(2 * 4096, 9) == b"of others"
                assert handler.evict(region, 0, 2 * 4096, write_back=None) == 2 * 4096
                assert region.read(4096, 4096) == content(size)[4096:8192]


def map_at(place: int, length: int, kind: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> None:
    LIBC.mmap.restype = ctypes.c_void_p
    address, size = ctypes.c_void_p(place), ctypes.c_size_t(length)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    assert LIBC.mmap(address, size, access, kind | MAP_FIXED, -1, ctypes.c_long(0)) == place


def replace(place: int, to: int, length: int) -> None:
    """Move memory, and map other memory where it was."""
    LIBC.mremap.restype = ctypes.c_void_p
    size, flags = ctypes.c_size_t(length), ctypes.c_int(MREMAP_MAYMOVE | MREMAP_FIXED)
    moved = LIBC.mremap(ctypes.c_void_p(place), size, size, flags, ctypes.c_void_p(to))
    assert moved == to
    map_at(place, length)
    ctypes.memset(place, ord("f"), length)


def moved_meanwhile(point: int, *, to_file: bool, apart: bool) -> None:
    """What is mapped where evicted memory was stays, and is not taken for it; pages are apart."""
    size = PAGES * 4096
    place, to = room(size), room(size)
    new, back = b"new".ljust(size, b"."), os.memfd_create("store")
    os.write(back, content(size))
    map_at(place, size)
    map_at(to, size)
    features = TRACKING | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    with (
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver="native") as handler,
        FileSource(back) as source,
    ):
        region = Region.at(place, size)
        handler.serve(region, source, mode=MISSING | WP)
        for at in range(0, size, 8192 if apart else 4096):
            region.write(at, new[at : at + 4096])
        with holding(Point(point)) as held:
            evicting = Task(
                lambda: handler.evict(
                    region,
                    write_back=back if to_file else lambda at, data: os.pwrite(back, data, at),
                )
            )
            held.wait()
            moving = Task(replace, place, to, size)
            if point == Point.EVICT_CLAIMED:  # its event stays unread
                time.sleep(0.05)
            else:
                moving.result()
        moving.result()
        assert evicting.result() == size // (2 if apart else 1)
        assert ctypes.string_at(place, size) == b"f" * size
        data = content(size)
        want = b"".join(
            (data if apart and at % 8192 else new)[at : at + 4096] for at in range(0, size, 4096)
        )
        assert os.pread(back, size, 0) == ctypes.string_at(to, size) == want
    os.close(back)


@needs(TRACKING)
@pytest.mark.parametrize(
    ("point", "to_file"),
    [(Point.EVICT_PLACED, True), (Point.EVICT_PLACED, False), (Point.EVICT_CLAIMED, True)],
)
@pytest.mark.parametrize("apart", [False, True])
def test_moved_meanwhile(point: Point, to_file: bool, apart: bool) -> None:
    run_child(moved_meanwhile, point, to_file=to_file, apart=apart)


MANY = 1100  # pages: more than are evicted at once
EVENTS = {
    "none": Feature(0),
    "moves": Feature.EVENT_REMAP | Feature.EVENT_UNMAP,
    "all": Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP,
}


def apart(name: str, events: str) -> None:
    """Every second page and some runs, of which each third was written, through each verb."""
    make = Region.memfd if name == "shmem" else Region.anonymous
    there = [page for page in range(MANY) if page % 2 == 0 or page % 100 < 5]
    written = there[::3]
    fd = os.memfd_create("store")
    os.write(fd, content(MANY * 4096))
    with (
        Userfaultfd(features=TRACKING | EVENTS[events]) as uffd,
        make(MANY * 4096) as region,
        FileSource(fd) as source,
        Handler(uffd, driver="native") as handler,
    ):
        handler.serve(region, source, mode=MISSING | WP)
        pairs = [(page * 4096, (page + 1) * 4096) for page in there]
        data = bytearray(content(region.length))

        def load(by: bytes) -> None:
            assert handler.populate(region, ranges=pairs) == len(there) * 4096
            for page in written:
                region.write(page * 4096, by)

        def check(got: int) -> None:
            assert got == len(there) * 4096
            assert states(handler, region) == [ABSENT] * MANY
            assert os.pread(fd, len(data), 0) == data

        def put(by: bytes) -> None:
            for page in written:
                data[page * 4096 : page * 4096 + len(by)] = by

        load(b"file")
        put(b"file")
        check(handler.evict(region, write_back=fd))
        load(b"only")
        put(b"only")
        check(handler.evict(region, write_back=source, written_only=True))
        load(b"call")
        put(b"call")
        check(handler.evict(region, write_back=lambda at, view: os.pwrite(fd, view, at)))
        load(b"none")
        check(handler.evict(region, write_back=None))
        assert region.read() == data
    os.close(fd)


@needs(NEEDED | Feature.EVENT_REMAP | Feature.EVENT_UNMAP)
@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("name", ["anon", "shmem"])
def test_pages_apart(name: str, events: str) -> None:
    run_child(apart, name, events, budget_s=20)


def one_in_flight(written_back: bool) -> None:
    """A page between others is being filled: it is waited for, and goes with them."""
    fd = os.memfd_create("store")
    os.write(fd, content(5 * 4096))
    with (
        Userfaultfd(features=TRACKING) as uffd,
        Region.anonymous(5 * 4096) as region,
        FileSource(fd) as source,
        Handler(uffd, driver="native") as handler,
    ):
        handler.serve(region, source, mode=MISSING | WP)
        for page in (0, 4):
            region.write(page * 4096, b"new")
        with holding(Point.FILL_CLAIMED) as claimed:
            filling = Task(handler.populate, region, 2 * 4096, 4096)
            claimed.wait()
            evicting = Task(lambda: handler.evict(region, write_back=fd if written_back else None))
            time.sleep(0.05)
            assert evicting.running
        assert filling.result() == 4096
        # If it had been protected before it came, it is not among those that go.
        assert evicting.result() in ((2 * 4096, 3 * 4096) if written_back else (3 * 4096,))
        data = bytearray(content(5 * 4096))
        for at in (0, 4 * 4096) if written_back else ():
            data[at : at + 3] = b"new"
        assert region.read() == data
    os.close(fd)


@needs(NEEDED)
@pytest.mark.parametrize("written_back", [False, True])
def test_a_page_in_flight_among_them(written_back: bool) -> None:
    run_child(one_in_flight, written_back)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        to_a_file,
        by_a_function,
        the_last_page,
        nothing,
        written_meanwhile,
        fails,
        dropped,
        dropped_unseen,
        touched_meanwhile,
        dropped_meanwhile,
        locked,
        the_file_too,
        no_write_is_lost,
        neither_zeros_nor_old,
    )
}


def check(name: str) -> None:
    for driver in DRIVERS:
        if driver != "process":
            with handling(driver) as handler:
                run_cases(CASES, handler, name)


@pytest.mark.parametrize("name", memory_params())
@needs(NEEDED)
def test_evict(name: str) -> None:
    run_child(check, name, budget_s=60)


def check_one(case: str) -> None:
    with handling("native") as handler:
        CASES[case](handler, "anon")


@needs(NEEDED)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("dropped", id="pitfall.11.evicted-after-it-was-dropped"),
        pytest.param("neither_zeros_nor_old", id="pitfall.11.evicted-under-readers"),
        pytest.param("touched_meanwhile", id="pitfall.11.touched-while-it-is-evicted"),
        pytest.param("dropped_meanwhile", id="pitfall.11.dropped-beside-an-eviction"),
    ],
)
def test_pitfalls(case: str) -> None:
    run_child(check_one, case)


def of_minor() -> None:
    """With MINOR too: what the page cache lost is a missing page again."""
    with handling("native") as handler, FileSource(__file__) as source:
        mode = MISSING | MINOR | WP
        with filling(handler, "shmem", source, mode) as region:
            first = region.read(0, 3)
            assert handler.evict(region, write_back=None) == 4096
            assert states(handler, region)[0] is ABSENT
            assert region.read(0, 3) == first == b'"""'


@needs(NEEDED)
def test_with_minor_faults() -> None:
    run_child(of_minor)


def refused() -> None:
    with (
        handling("native") as handler,
        filling(handler, "anon", mode=MISSING | WP) as region,
        filling(handler, "anon") as without_wp,
        filling(handler, "anon", mode=WP) as without_missing,
    ):
        region.write(0, b"new")
        read_only = os.open(os.devnull, os.O_RDONLY)
        file = os.open("/proc/self/exe", os.O_RDONLY)
        pipe = os.pipe()
        for bad in (read_only, file, *pipe):
            with pytest.raises(ValueError, match="write_back"):
                handler.evict(region, write_back=bad)
            os.close(bad)
        with (
            FileSource(__file__) as of_a_path,
            pytest.raises(ValueError, match=r"open the file for writing"),
        ):
            handler.evict(region, write_back=of_a_path)
        for wrong in ("text", b"bytes", 1.5, dict, [1], True, False):
            with pytest.raises(TypeError, match="write_back"):
                handler.evict(region, write_back=wrong)  # type: ignore[arg-type]
        for range_ in ((1, 4096), (0, 5 * 4096), (-4096, 4096), (0, 0)):
            with pytest.raises(ValueError):
                handler.evict(region, *range_, write_back=None)
        with pytest.raises(ValueError, match="written_only needs a write_back"):
            handler.evict(region, write_back=None, written_only=True)
        with pytest.raises(ValueError, match="not served for WP"):
            handler.evict(without_wp, write_back=print)
        with pytest.raises(ValueError, match="not served for MISSING"):
            handler.evict(without_missing, write_back=None)
        assert states(handler, region)[0] is PageState.DIRTY
        assert region.read(0, 3) == b"new"
    with (
        handling("process") as handler,
        filling(handler, "anon") as region,
        pytest.raises(ValueError, match="driver='process' cannot evict"),
    ):
        handler.evict(region, write_back=None)


@needs(NEEDED)
def test_refuses_bad_arguments() -> None:
    run_child(refused, budget_s=20)


def elsewhere() -> None:
    """Memory that is served at another address too would turn into zeros there."""
    data = content(PAGES * 4096)
    with handling("native") as one, handling("native") as two:
        for handler in (one, two):
            with Region.memfd(len(data)) as region, region.alias() as alias:
                second, third = slice(4096, 8192), slice(8192, 12288)
                one.serve(region, data, mode=MISSING)
                handler.serve(alias[second], data[second], mode=MISSING)
                assert region.read(0, region.length) == alias.read(0, region.length) == data
                for by, part in ((one, region), (one, region[second]), (handler, alias[second])):
                    with pytest.raises(ValueError, match="is the same memory"):
                        by.evict(part, write_back=None)
                assert one.evict(region, 0, 4096, write_back=None) == 4096
                one.unserve(region[third])
                handler.serve(alias[third], data[third], mode=MISSING, present="keep")
                with pytest.raises(ValueError, match="is the same memory"):
                    one.serve(region[third], data[third], mode=MISSING, present="drop")
                handler.unserve(alias[second])
                assert one.evict(region[second], write_back=None) == 4096
                assert region.read(0, 12288) == data[:12288]


@needs(NEEDED)
def test_refuses_memory_that_is_served_elsewhere() -> None:
    run_child(elsewhere)


def private_of_a_file(mapped_by_others: bool) -> None:
    """Without its own copy a private mapping shows the page of its file, and asks no source."""
    with Region.memfd(2 * 4096, shared=False) as whole, handling("native") as handler:
        assert whole.fd is not None
        os.pwrite(whole.fd, b"file", 4096)
        region = Region.at(whole.start, whole.length) if mapped_by_others else whole
        store = bytearray(b"s" * region.length)
        handler.serve(region, store, mode=MISSING | WP, present="keep")
        region.write(0, b"new")
        region.write(4096, b"new")

        def write_back(offset: int, data: memoryview) -> None:
            store[offset : offset + len(data)] = data

        for write in (write_back, None):
            with pytest.raises(ValueError, match="a file that has pages there"):
                handler.evict(region, write_back=write)
        assert region.read(4096, 4) == b"newe"
        assert handler.evict(region, 0, 4096, write_back=write_back) == 4096
        assert region.read(0, 4) == b"news"


@needs(NEEDED)
@pytest.mark.parametrize("mapped_by_others", [False, True])
def test_refuses_a_private_mapping_of_pages_of_a_file(mapped_by_others: bool) -> None:
    run_child(private_of_a_file, mapped_by_others)


def before_the_start() -> None:
    with handling("native", autostart=False) as handler, filling(handler, "anon") as region:
        with pytest.raises(ValueError, match="start"):
            handler.evict(region, write_back=None)
        handler.start()
        region.write(0, b"x")
        assert handler.evict(region, write_back=None) == mmap.PAGESIZE


@needs(NEEDED)
def test_needs_a_reader_of_its_events() -> None:
    run_child(before_the_start)


def zeros_come_back() -> None:
    """From a ZeroSource too."""
    with handling("native") as handler, filling(handler, "anon", ZeroSource()) as region:
        region.write(0, b"x")
        assert handler.evict(region, write_back=None) == 4096
        assert region.read(0, 1) == b"\0"
        assert states(handler, region)[0] is CLEAN


@needs(NEEDED)
def test_of_zeros() -> None:
    run_child(zeros_come_back)
