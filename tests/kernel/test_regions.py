"""Region: content, aliases, and what every memory type has in common."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import select
import threading
from collections.abc import Callable

import pytest

from pyuffd import (
    ClosedError,
    Feature,
    PageExistsError,
    Pagefault,
    PartialResolveError,
    Region,
    RegionKind,
    Unmap,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params

PAGE = 4096
MAP_FIXED_NOREPLACE = 0x100000  # not in the mmap module


def mapped(start: int) -> bool:
    """Return whether the kernel maps this address."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= start < last:
                return True
    return False


def test_attributes(memory: Memory) -> None:
    region = memory.pages(2)
    assert region.length == len(region) == 2 * memory.page_size
    assert region.page_size == memory.page_size
    assert region.shared == memory.shared
    assert region.writable
    assert region.offset == 0
    assert region.start % memory.page_size == 0
    assert region.kind is (RegionKind.ANONYMOUS if memory.is_anon else RegionKind.MEMFD)
    assert (region.fd is None) == memory.is_anon
    assert hex(region.start) in repr(region)
    assert region.kind.value in repr(region)


def test_new_memory_is_zero(memory: Memory) -> None:
    region = memory.pages(1)
    assert region.read() == bytes(memory.page_size)


def test_write_and_read_across_pages(memory: Memory) -> None:
    region = memory.pages(2)
    middle = memory.page_size - 3
    region.write(middle, b"middle")
    assert region.read(middle, 6) == b"middle"
    assert region.read(middle - 1, 8) == b"\0middle\0"
    assert region.read(region.length, 0) == b""


def test_write_takes_any_contiguous_buffer(memory: Memory) -> None:
    region = memory.pages(1)
    for data in (b"ab", bytearray(b"ab"), memoryview(b"ab"), memoryview(b"ab").cast("H")):
        region.fill(0)
        region.write(1, data)
        assert region.read(0, 4) == b"\0ab\0"


def test_fill(memory: Memory) -> None:
    region = memory.pages(2)
    region.fill(0xAB)
    assert region.read() == b"\xab" * region.length
    region.fill(1, 3, 2)
    assert region.read(2, 4) == b"\xab\1\1\xab"


@pytest.mark.parametrize("name", ["sha256", "md5", "blake2b", "sha3_256"])
def test_digest_equals_hashlib(memory: Memory, name: str) -> None:
    region = memory.pages(2)
    region.write(memory.page_size - 2, os.urandom(100))
    content = region.read()
    assert region.digest(name) == hashlib.new(name, content).digest()
    for offset, length in ((0, 0), (1, 5), (3, 2047), (0, 2048), (1, memory.page_size + 7)):
        part = content[offset : offset + length]
        assert region.digest(name, offset, length) == hashlib.new(name, part).digest()


def test_touch_makes_pages_present(memory: Memory) -> None:
    region = memory.pages(4)
    region.touch(memory.page_size + 1, memory.page_size, write=True)  # parts of pages 1 and 2
    present = [state.name for state in region.residency()]
    assert present[1] in {"MAPPED", "PRIVATE"}
    assert present[2] in {"MAPPED", "PRIVATE"}
    assert present[0] not in {"MAPPED", "PRIVATE"}
    assert present[3] not in {"MAPPED", "PRIVATE"}
    assert region.read() == bytes(region.length)


@pytest.mark.parametrize(
    ("offset", "n"), [(-1, 1), (0, -1), (0, 1 << 40), (1 << 40, 1), (1 << 40, None)]
)
def test_outside_the_region(memory: Memory, offset: int, n: int | None) -> None:
    region = memory.pages(1)
    calls: list[Callable[[], object]] = [
        lambda: region.read(offset, n),
        lambda: region.fill(1, offset, n),
        lambda: region.touch(offset, n),
        lambda: region.digest(offset=offset, length=n),
        lambda: region.madvise(4, offset, n),
        lambda: region.punch_hole(offset, n),
        lambda: region.residency(offset, n),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError):
        region.write(region.length - 1, b"ab")
    assert region.read() == bytes(region.length)


@pytest.mark.parametrize("value", [-1, 256])
def test_fill_refuses_what_is_no_byte(memory: Memory, value: int) -> None:
    with pytest.raises(ValueError):
        memory.pages(1).fill(value)


def test_alias_sees_writes(memory: Memory) -> None:
    region = memory.pages(2)
    if not memory.shared:
        with pytest.raises(ValueError):
            region.alias()
        return
    with region.alias() as alias:
        assert alias.start != region.start
        assert (alias.length, alias.page_size) == (region.length, region.page_size)
        alias.write(memory.page_size, b"alias")
        assert region.read(memory.page_size, 5) == b"alias"
        region.write(0, b"region")
        assert alias.read(0, 6) == b"region"
        region.close()
        assert alias.read(0, 6) == b"region"


def test_close(memory: Memory) -> None:
    region = memory.pages(1)
    start, fd = region.start, region.fd
    assert mapped(start)
    region.close()
    region.close()
    assert region.closed
    assert region.fd is None
    assert not mapped(start)
    if fd is not None:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert "closed" in repr(region)
    assert region.length == memory.page_size


def closed_again() -> None:
    length = 16 * PAGE
    with Userfaultfd(features=Feature.EVENT_UNMAP) as uffd:
        region = Region.anonymous(length)
        start = region.start
        uffd.register(region)
        closer = threading.Thread(target=region.close)
        closer.start()
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        assert poll.poll(10_000)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        found = _memory.mmap(length, mmap.PROT_READ, flags, address=start)
        try:
            assert found == start
            region.close()
            assert mapped(start)
        finally:
            assert [type(event) for event in uffd.read_events()] == [Unmap]
            closer.join()
            assert mapped(start)
            _memory.munmap(start, length)


@needs(Feature.EVENT_UNMAP)
def test_closed_again_while_the_kernel_waits() -> None:
    """What is mapped there since stays: munmap(2) waits until its event is read."""
    run_child(closed_again)


def test_use_after_close(memory: Memory) -> None:
    region = memory.pages(1)
    region.close()
    calls: list[Callable[[], object]] = [
        lambda: region.start,
        region.read,
        lambda: region.write(0, b"x"),
        lambda: region.fill(1),
        region.touch,
        region.digest,
        lambda: region.madvise(4),
        region.pageout if not memory.is_hugetlb else region.read,
        region.punch_hole,
        region.residency,
        region.alias,
        region.memoryview,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_context_manager_closes_on_an_exception(memory: Memory) -> None:
    region = memory.pages(1)
    with pytest.raises(KeyError), region:
        raise KeyError
    assert region.closed


def test_forgotten_region_warns_and_is_unmapped() -> None:
    with pytest.warns(ResourceWarning):
        region = Region.anonymous(1 << 20)
        start = region.start
        del region
        gc.collect()
    assert not mapped(start)


def test_on_close_callbacks_run_first_and_newest_first(memory: Memory) -> None:
    region = memory.pages(1)
    seen: list[object] = []
    region._on_close(lambda: seen.append(region.read(0, 1)))
    region._on_close(lambda: seen.append("newest"))

    def taken_back() -> None:
        seen.append("taken back")

    region._on_close(taken_back)
    region._forget_on_close(taken_back)
    region._forget_on_close(taken_back)
    region.close()
    assert seen == ["newest", b"\0"]


def test_large_regions_are_aligned_for_huge_pages() -> None:
    huge = 2 << 20
    with Region.anonymous(huge + 4096) as anonymous, Region.memfd(3 * huge) as memfd:
        assert anonymous.start % huge == 0
        assert memfd.start % huge == 0
        with memfd.alias() as alias:
            assert alias.start % huge == 0


def test_fork_uses_and_closes_its_own_copy(memory: Memory) -> None:
    run_child(fork_uses_and_closes_its_own_copy, memory.name)


def fork_uses_and_closes_its_own_copy(name: str) -> None:
    memory = memory_of(name)
    region = memory.pages(1)
    region.write(0, b"parent")
    seen: list[int] = []
    region._on_close(lambda: seen.append(os.getpid()))
    pid = os.fork()
    if pid == 0:
        ok = region.read(0, 6) == b"parent"
        region.write(0, b"child!")
        region.close()
        os._exit(0 if ok and region.closed and not seen else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert region.read(0, 6) == (b"child!" if memory.shared else b"parent")
    region.close()
    assert seen == [os.getpid()]
    memory.close()


@pytest.mark.parametrize("name", memory_params())
def test_nothing_holds_the_gil(name: str) -> None:
    """A Python thread serves the faults of every method: one that held the GIL would hang."""
    run_child(serve_while_touching, name, budget_s=20)


def filled(uffd: Userfaultfd, address: int, content: bytes) -> bool:
    """Resolve a missing fault; return False if it must wait for a layout event."""
    try:
        uffd.copy(address, content)
    except PageExistsError:
        uffd.wake(address, len(content))
    except PartialResolveError:
        return False
    return True


def serve_while_touching(name: str) -> None:
    memory = memory_of(name)
    events = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    with Userfaultfd(features=events) as uffd:
        page = memory.page_size
        region = memory.pages(8)
        start = region.start
        uffd.register(region)
        stop = threading.Event()
        counts = {"Pagefault": 0, "Remove": 0, "Unmap": 0}
        content = b"\5" * page

        def serve() -> None:
            waiting: list[int] = []
            while not stop.is_set():
                for event in uffd.read_events():
                    counts[type(event).__name__] += 1
                    if isinstance(event, Pagefault):
                        waiting.append(event.address - event.address % page)
                waiting = [address for address in waiting if not filled(uffd, address, content)]

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert region.read(0, 3) == b"\5\5\5"
            region.write(page, b"12")
            region.fill(0, 2 * page, 1)
            region.touch(3 * page, page)
            region.touch(4 * page, page, write=True)
            both = hashlib.sha256(content * 2).digest()
            assert region.digest("sha256", 4 * page, 2 * page) == both
            assert region.digest("sha256", 6 * page, 7) == hashlib.sha256(b"\5" * 7).digest()
            assert counts["Pagefault"] >= 7
            region.punch_hole(0, page)
            assert region.read(0, 1) == b"\5"
            region.close()
        finally:
            stop.set()
            thread.join()
    assert counts["Remove"] == 1
    assert counts["Unmap"] == 1
    assert not mapped(start)
    memory.close()
