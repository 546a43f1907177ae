"""Handler: missing, minor and write-protect faults, on every memory type with both C drivers."""

from __future__ import annotations

import errno
import gc
import hashlib
import mmap
import os
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    Ioctl,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    ZeroSource,
)
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import (
    Driver,
    both_drivers,
    content,
    everywhere,
    serving,
    states,
    with_both_drivers,
)

ABSENT, CLEAN, DIRTY, REMOVED = (
    PageState.ABSENT,
    PageState.CLEAN,
    PageState.DIRTY,
    PageState.REMOVED,
)
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR


# Missing


def zeros(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        ioctls = handler.serve(region, ZeroSource())
        assert ioctls & Ioctl.COPY
        handler.start()
        assert region.read(memory.page_size, 16) == bytes(16)
        assert states(handler, region) == [ABSENT, CLEAN, ABSENT]
        region.write(0, b"written")
        assert region.read(0, 8) == b"written\0"
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT]
        assert handler.stats().faults == {"missing": 2, "wp": 0, "minor": 0}


test_zero_source = everywhere(zeros)


def buffer(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert region.read(2 * memory.page_size + 5, 10) == data[2 * memory.page_size + 5 :][:10]
        assert states(handler, region) == [ABSENT, ABSENT, CLEAN]
        assert region.read() == data
        assert handler.stats().faults == {"missing": 3, "wp": 0, "minor": 0}
        assert handler.stats().filled_pages == 3


test_buffer_source = everywhere(buffer, "anon", "shmem", "hugetlb")


def late_serve(driver: Driver, name: str) -> None:
    """A region served while the handler runs, and a source without other references."""
    with serving(driver, name) as (handler, memory):
        handler.start()
        region = memory.pages(2)
        handler.serve(region, BufferSource(content(region.length)))
        assert region.digest() == hashlib.sha256(content(region.length)).digest()


test_serve_after_start = everywhere(late_serve, "anon", "shmem", "hugetlb")


def file_source(driver: Driver, name: str) -> None:
    """From an odd offset, ending inside the last page: the rest of that page is zeros."""
    with serving(driver, name) as (handler, memory), tempfile.TemporaryFile() as file:
        region = memory.pages(3)
        skip, length = 12345, 2 * memory.page_size + 777
        file.write(content(skip + length))
        file.flush()
        with FileSource(file, offset=skip) as source:
            handler.serve(region, source)
        file.close()  # the engine has its own descriptor
        handler.start()
        expected = content(skip + length)[skip:].ljust(region.length, b"\0")
        assert region.read(region.length - 1, 1) == b"\0"
        assert states(handler, region) == [ABSENT, ABSENT, CLEAN]
        assert region.read() == expected


test_file_source = everywhere(file_source)


def file_tail_variants(driver: Driver, name: str) -> None:
    """Every place where the source can end, with faults, prefetch and populate."""
    for tail in (1, -1, 0, 5):
        for way in ("fault", "prefetch", "populate"):
            prefetch = 0 if way == "fault" else 64 << 20
            with (
                serving(driver, name, prefetch=prefetch) as (handler, memory),
                tempfile.TemporaryFile() as file,
            ):
                region = memory.pages(2)
                length = memory.page_size + tail if tail > 0 else region.length + tail
                file.write(content(length))
                file.flush()
                with FileSource(file.fileno()) as source:
                    handler.serve(region, source)
                handler.start()
                if way == "populate":
                    assert handler.populate(region) == region.length
                assert region.read() == content(length).ljust(region.length, b"\0"), (tail, way)


test_file_source_end = everywhere(file_tail_variants, "anon", "shmem", "hugetlb")


def longer_source(driver: Driver) -> None:
    """A source may be longer than the region."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(2)
        data = content(5 * PAGE + 3)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert region.read() == data[: 2 * PAGE]


test_source_longer_than_region = with_both_drivers(longer_source)


def short_buffer(driver: Driver) -> None:
    """A buffer that ends inside the last page, one byte into it."""
    with serving(driver, "shmem") as (handler, memory):
        region = memory.pages(2)
        data = content(PAGE + 1)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert region.read() == data.ljust(2 * PAGE, b"\0")


test_buffer_source_end = with_both_drivers(short_buffer)


def buffer_kinds(driver: Driver) -> None:
    import numpy

    with serving(driver, "anon") as (handler, memory), Region.anonymous(PAGE) as source_region:
        source_region.fill(7)
        view = source_region.memoryview()
        array = numpy.arange(PAGE // 8, dtype=numpy.int64)
        sources = [
            BufferSource(b"r" * PAGE),
            BufferSource(bytearray(b"a" * PAGE)),
            BufferSource(view),
            BufferSource(array.data),
        ]
        regions = [memory.pages(1) for _ in sources]
        for region, source in zip(regions, sources, strict=True):
            handler.serve(region, source)
        handler.start()
        expected = [b"r" * PAGE, b"a" * PAGE, b"\7" * PAGE, array.tobytes()]
        assert [region.read() for region in regions] == expected
        handler.stop()
        del sources, source, view


test_kinds_of_buffers = with_both_drivers(buffer_kinds)


def dropped(driver: Driver, name: str) -> None:
    """A page that its owner drops after it was loaded is zeros, whatever the source has."""
    with serving(driver, name, prefetch=1 << 30) as (handler, memory):
        region = memory.pages(4)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        handler.populate(region)
        size = memory.page_size
        region.punch_hole(size, size)
        assert region.read(size, size) == bytes(size)
        assert states(handler, region) == [CLEAN, REMOVED, CLEAN, CLEAN]
        if not memory.shared:
            region.madvise(mmap.MADV_DONTNEED, 3 * size, size)
            assert region.read(3 * size, size) == bytes(size)
        assert region.read(0, size) == data[:size]
        region.punch_hole(size, size)
        assert region.read(size, 1) == b"\0"
        assert handler.populate(region) == 0


test_removed_page_is_zero = everywhere(dropped)


# Minor


def minor(driver: Driver, name: str) -> None:
    """Pages that the page cache has are mapped, without a source."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data = content(region.length)
        with region.alias() as alias:
            alias.write(0, data)
        handler.serve(region, None, mode=MINOR)
        handler.start()
        assert region.read(memory.page_size, 4) == data[memory.page_size :][:4]
        assert states(handler, region) == [ABSENT, CLEAN, ABSENT]
        assert region.read() == data
        assert handler.stats().faults == {"missing": 0, "wp": 0, "minor": 3}


test_minor_without_source = everywhere(minor, "shmem", "hugetlb")


def minor_with_source(driver: Driver, name: str) -> None:
    """The first touch of a page replaces what the page cache has with the source's content."""
    with serving(driver, name) as (handler, memory), tempfile.TemporaryFile() as file:
        with_buffer, with_file, with_zeros = (memory.pages(3) for _ in range(3))
        data = content(with_buffer.length)
        length = with_file.length - 100
        file.write(data[:length])
        file.flush()
        for region in (with_buffer, with_file, with_zeros):
            region.fill(0xEE)
            region.madvise(mmap.MADV_DONTNEED)  # unmaps; the page cache keeps it
        handler.serve(with_buffer, BufferSource(data), mode=MINOR)
        with FileSource(file) as source:
            handler.serve(with_file, source, mode=MINOR)
        handler.serve(with_zeros, ZeroSource(), mode=MINOR)
        handler.start()
        assert with_buffer.read() == data
        assert with_file.read() == data[:length] + bytes(100)
        assert with_zeros.read() == bytes(with_zeros.length)
        assert handler.stats().faults == {"missing": 0, "wp": 0, "minor": 9}
        # Loaded pages belong to the program: only the mapping is restored.
        with_buffer.write(0, b"own")
        with_buffer.madvise(mmap.MADV_DONTNEED)
        assert with_buffer.read() == b"own" + data[3:]


test_minor_with_source = everywhere(minor_with_source, "shmem", "hugetlb")


def minor_local(driver: Driver) -> None:
    """With `local`, any object that describes a range can be served."""
    with serving(driver, "shmem") as (handler, memory):
        region = memory.pages(2)
        region.fill(1)
        region.madvise(mmap.MADV_DONTNEED)
        with region.alias() as alias:
            place = SimpleNamespace(start=region.start, length=region.length, page_size=PAGE)
            handler.serve(place, BufferSource(content(2 * PAGE)), mode=MINOR, local=alias)
            handler.start()
            assert region.read() == content(2 * PAGE)
            handler.stop()


test_minor_with_local = with_both_drivers(minor_local)


def minor_holes(driver: Driver, name: str) -> None:
    """Pages that are not in the page cache yet get the source's content too, never zeros."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data = content(region.length)
        handler.serve(region, BufferSource(data), mode=MINOR)
        handler.start()
        assert region.read() == data


test_minor_with_source_on_holes = everywhere(minor_holes, "shmem", "hugetlb")


def minor_and_missing(driver: Driver, name: str) -> None:
    """Pages in the page cache are mapped as they are, holes are filled from the source."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data, size = content(region.length), memory.page_size
        with region.alias() as alias:
            alias.fill(0xCA, size, size)
        handler.serve(region, BufferSource(data), mode=MISSING | MINOR)
        handler.start()
        assert region.read() == data[:size] + b"\xca" * size + data[2 * size :]
        assert handler.stats().faults == {"missing": 2, "wp": 0, "minor": 1}


test_minor_and_missing = everywhere(minor_and_missing, "shmem", "hugetlb")


# Write-protect


def write_protect(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        region.fill(1)
        handler.serve(region, None, mode=WP)
        handler.writeprotect(region)
        handler.start()
        assert region.read(0, 4) == b"\1" * 4
        assert states(handler, region) == [CLEAN] * 4
        region.write(memory.page_size, b"x")
        region.write(3 * memory.page_size + 9, b"y")
        region.write(3 * memory.page_size + 10, b"y")
        assert states(handler, region) == [CLEAN, DIRTY, CLEAN, DIRTY]
        assert handler.stats().faults == {"missing": 0, "wp": 2, "minor": 0}
        handler.writeprotect(region)
        assert states(handler, region) == [CLEAN] * 4
        region.write(3 * memory.page_size, b"z")
        assert states(handler, region) == [CLEAN, CLEAN, CLEAN, DIRTY]
        handler.stop()
        region.fill(2)  # no page is protected any more
        assert region.read() == b"\2" * region.length


test_write_protect = everywhere(write_protect)


def write_protect_holes(driver: Driver, name: str) -> None:
    """The first write to a page that was never present is seen too."""
    for features in (Feature(0), Feature.WP_UNPOPULATED):
        with serving(driver, name, features) as (handler, memory):
            region = memory.pages(3)
            region.write(0, b"there")
            handler.serve(region, None, mode=WP)
            handler.writeprotect(region)
            handler.start()
            region.write(memory.page_size, b"x")
            assert states(handler, region) == [CLEAN, DIRTY, CLEAN], features
            assert region.read(2 * memory.page_size, 4) == bytes(4)
            region.write(2 * memory.page_size, b"y")
            assert states(handler, region) == [CLEAN, DIRTY, DIRTY], features


test_write_protect_holes = everywhere(write_protect_holes)


def write_protect_ranges(driver: Driver, way: str) -> None:
    """The same for anonymous memory that another object describes."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(2)
        place: Any
        if way == "at":
            place = Region.at(region.start, region.length)
        else:
            place = SimpleNamespace(start=region.start, length=region.length, page_size=PAGE)
        handler.serve(place, None, mode=WP)
        handler.writeprotect(place)
        handler.start()
        region.write(PAGE, b"x")
        assert states(handler, place) == [CLEAN, DIRTY]
        handler.stop()


@both_drivers
@pytest.mark.parametrize("way", ["at", "range"])
def test_write_protect_holes_of_foreign_mapping(driver: Driver, way: str) -> None:
    run_child(write_protect_ranges, driver, way)


def missing_and_wp(driver: Driver, name: str) -> None:
    """Pages arrive protected: a read leaves them clean, a write makes them dirty."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        data, size = content(region.length), memory.page_size
        handler.serve(region, BufferSource(data), mode=MISSING | WP)
        handler.start()
        assert region.read(0, size) == data[:size]
        assert states(handler, region) == [CLEAN, ABSENT, ABSENT, ABSENT]
        region.write(0, b"w")
        region.write(size, b"w")
        assert states(handler, region) == [DIRTY, DIRTY, ABSENT, ABSENT]
        assert handler.stats().faults == {"missing": 2, "wp": 2, "minor": 0}
        handler.writeprotect(region)
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT, ABSENT]
        region.write(size, b"again")
        region.write(2 * size, b"first")
        assert states(handler, region) == [CLEAN, DIRTY, DIRTY, ABSENT]
        region.punch_hole(size, size)
        assert region.read(size, 5) == bytes(5)
        assert states(handler, region)[1] is REMOVED
        region.write(size, b"new")
        assert states(handler, region)[1] is DIRTY
        assert handler.populate(region) == size
        expected = b"w" + data[1:size] + b"new".ljust(size, b"\0") + b"first"
        expected += data[len(expected) :]
        assert region.read() == expected


test_missing_and_wp = everywhere(missing_and_wp)


def minor_and_wp(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data, size = content(region.length), memory.page_size
        with region.alias() as alias:
            alias.write(0, data)
        handler.serve(region, None, mode=MINOR | WP)
        handler.start()
        assert region.read(0, size) == data[:size]
        region.write(size, b"w")
        assert states(handler, region) == [CLEAN, DIRTY, ABSENT]
        assert handler.stats().faults == {"missing": 0, "wp": 1, "minor": 2}
        handler.writeprotect(region)
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT]
        region.write(0, b"W")
        assert states(handler, region) == [DIRTY, CLEAN, ABSENT]
        assert region.read(2 * size) == data[2 * size :]


test_minor_and_wp = everywhere(minor_and_wp, "shmem", "hugetlb")


# Accesses by the kernel


def system_calls_native(name: str) -> None:
    with serving("native", name) as (handler, memory):
        region = memory.pages(4)
        data, size = content(region.length), memory.page_size
        handler.serve(region, BufferSource(data))
        handler.start()
        view = region.memoryview()
        with tempfile.TemporaryFile(buffering=0) as file:
            assert os.write(file.fileno(), view[:size]) == size  # the kernel reads page 0
            file.seek(0)
            assert os.readv(file.fileno(), [view[size : 2 * size]]) == size  # and writes page 1
            assert os.pwritev(file.fileno(), [view[2 * size :]], 0) == 2 * size
            assert file.seek(0) == 0
            assert file.read() == data[2 * size :]
        assert region.read() == data[:size] * 2 + data[2 * size :]
        assert handler.stats().faults["missing"] == 4
        del view


@needs_kernel_faults()
@pytest.mark.parametrize("name", ["anon", "shmem", "shmem-private"])
def test_system_calls_with_native(name: str) -> None:
    run_child(system_calls_native, name)


def system_calls_inline(name: str) -> None:
    with serving("inline", name) as (handler, memory):
        region = memory.pages(2)
        data, size = content(region.length), memory.page_size
        handler.serve(region, BufferSource(data))
        handler.start()
        view = region.memoryview()
        with tempfile.TemporaryFile(buffering=0) as file:
            for call in (os.write, lambda fd, part: os.readv(fd, [part])):
                file.truncate(size)
                file.seek(0)
                with pytest.raises(OSError) as caught:
                    call(file.fileno(), view[:size])
                assert caught.value.errno == errno.EFAULT
            assert states(handler, region) == [ABSENT, ABSENT]
            assert handler.populate(region, 0, size) == size
            file.truncate(0)
            file.seek(0)
            assert os.write(file.fileno(), view[:size]) == size
            file.seek(0)
            assert file.read() == data[:size]
            file.seek(0)
            assert os.readv(file.fileno(), [view[:size]]) == size
        assert states(handler, region) == [CLEAN, ABSENT]
        assert handler.stats().faults["missing"] == 0
        assert region.read() == data
        del view, caught
        gc.collect()  # the tracebacks' frames have slices of it


@pytest.mark.parametrize("name", ["anon", "shmem", "shmem-private"])
def test_system_calls_with_inline(name: str) -> None:
    run_child(system_calls_inline, name)


# Populate


def populate(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        data, size = content(region.length), memory.page_size
        handler.serve(region, BufferSource(data))
        assert handler.populate(region, size, size) == size  # before start() as well
        assert states(handler, region) == [ABSENT, CLEAN, ABSENT, ABSENT]
        handler.start()
        assert handler.populate(region) == 3 * size
        assert handler.populate(region) == 0
        assert states(handler, region) == [CLEAN] * 4
        assert region.read() == data
        stats = handler.stats()
        assert (stats.filled_pages, stats.prefetched_pages) == (4, 0)
        assert stats.faults == {"missing": 0, "wp": 0, "minor": 0}


test_populate = everywhere(populate)


def populate_minor(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data = content(region.length)
        with region.alias() as alias:
            alias.write(0, data)
        handler.serve(region, None, mode=MINOR)
        assert handler.populate(region) == region.length
        handler.start()
        assert region.read() == data
        assert handler.stats().faults["minor"] == 0


test_populate_minor = everywhere(populate_minor, "shmem", "hugetlb")


def parts(driver: Driver) -> None:
    """page_states and populate accept parts of a region, and refuse pages outside."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(4)
        handler.serve(region, ZeroSource())
        handler.populate(region, PAGE, 2 * PAGE)
        assert handler.page_states(region, PAGE) == bytes([CLEAN, CLEAN, ABSENT])
        assert handler.page_states(region, 3 * PAGE, PAGE) == bytes([ABSENT])
        calls = (handler.page_states, handler.populate)
        bad = [(1, PAGE), (0, PAGE + 1), (-PAGE, PAGE), (0, 0), (0, 5 * PAGE), (4 * PAGE, PAGE)]
        for call in calls:
            for offset, length in bad:
                with pytest.raises(ValueError):
                    call(region, offset, length)


test_parts_of_a_region = with_both_drivers(parts)


def auto_driver() -> None:
    from pyuffd import Handler, Userfaultfd

    for features, driver in ((Feature(0), "native"), (Feature.SIGBUS, "inline")):
        with (
            Userfaultfd(features=features) as uffd,
            Region.anonymous(PAGE) as region,
            Handler(uffd) as handler,
        ):
            assert handler.driver == driver
            source: PageSource = BufferSource(b"a" * PAGE)
            handler.serve(region, source)
            handler.start()
            assert region.read(0, 1) == b"a"


def test_auto_driver() -> None:
    run_child(auto_driver)
