"""Unusual files as page sources: block devices, huge pages, direct I/O; and files without pages."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._loop import loop_device, needs_loop_device
from tests.kernel._serving import content, is_lost

DRIVERS = ["native", "inline", "thread", "process"]
drivers = pytest.mark.parametrize("driver", DRIVERS)


@contextlib.contextmanager
def served(driver: Any, source: FileSource, length: int) -> Iterator[tuple[Handler, Region]]:
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        Userfaultfd(features=features) as uffd,
        Region.anonymous(length) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        handler.serve(region, source)
        handler.start()
        yield handler, region


def block_device(driver: str, offset: int) -> None:
    data = content(8 * PAGE)
    with loop_device(len(data)) as device:
        device.write(data)
        with FileSource(device.path, offset) as source:
            assert source.length == len(data) - offset
            length = -(-source.length // PAGE) * PAGE
            with served(driver, source, length) as (handler, region):
                assert region.read(PAGE, 10) == data[offset + PAGE : offset + PAGE + 10]
                assert handler.populate(region) == length - PAGE
                assert region.read() == data[offset:].ljust(length, b"\0")


@pytest.mark.crossing
@needs_loop_device()
@drivers
@pytest.mark.parametrize("offset", [0, 512, 1000, PAGE])
def test_block_device(driver: str, offset: int) -> None:
    run_child(block_device, driver, offset)


def shrinking_block_device(driver: str) -> None:
    data = content(4 * PAGE)
    with loop_device(len(data)) as device:
        device.write(data)
        with (
            FileSource(device.path) as source,
            served(driver, source, len(data)) as (handler, region),
        ):
            assert region.read(0, PAGE) == data[:PAGE]
            device.resize(2 * PAGE)
            assert source.length == 2 * PAGE
            assert region.read(PAGE, PAGE) == data[PAGE : 2 * PAGE]
            assert is_lost(region, 3 * PAGE)
            assert handler.page_states(region)[3] == PageState.POISONED
            with pytest.raises(HandlerError):
                handler.stop()


@needs_loop_device()
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_block_device_that_shrinks(driver: str) -> None:
    run_child(shrinking_block_device, driver)


def too_short_block_device() -> None:
    with (
        loop_device(PAGE) as device,
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        FileSource(device.path) as source,
        Handler(uffd) as handler,
    ):
        with pytest.raises(ValueError, match="ends before"):
            handler.serve(region, source)
        handler.serve(region, ZeroSource())


@needs_loop_device()
def test_block_device_that_is_too_short() -> None:
    run_child(too_short_block_device)


def mappings(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def file_of_huge_pages(driver: str, offset: int) -> None:
    data = content(2 * HUGE_PAGE)
    with Region.memfd(len(data), huge_page_size=HUGE_PAGE) as huge:
        huge.write(0, data)
        before = mappings("memfd:")
        assert huge.fd is not None
        with FileSource(huge.fd, offset) as source:
            with served(driver, source, 3 * PAGE) as (_, region):
                assert region.read() == data[offset : offset + 3 * PAGE]
            assert mappings("memfd:") == before


@pytest.mark.crossing
@needs_hugepages(2)
@drivers
@pytest.mark.parametrize("offset", [0, PAGE, HUGE_PAGE - PAGE, HUGE_PAGE + 5])
def test_file_of_huge_pages(driver: str, offset: int) -> None:
    """Its mapping begins and ends at huge pages, wherever the content begins."""
    run_child(file_of_huge_pages, driver, offset)


def direct(driver: str, offset: int) -> None:
    data = content(2 * PAGE + 100)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        with FileSource(fd, offset) as source, served(driver, source, 3 * PAGE) as (_, region):
            assert region.read() == data[offset:].ljust(3 * PAGE, b"\0")
        os.close(fd)


@drivers
@pytest.mark.parametrize("offset", [0, 1])
def test_direct_io_file_that_ends_inside_a_page(driver: str, offset: int) -> None:
    run_child(direct, driver, offset)


def appended(driver: str) -> None:
    """Bytes appended later are not served: serve() has read the last page."""
    data = content(PAGE + 100)
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(data)
        with FileSource(file.name) as source, served(driver, source, 2 * PAGE) as (_, region):
            file.write(b"more" * PAGE)
            other = Path(file.name + ".new")
            other.write_bytes(bytes(2 * PAGE))
            other.rename(file.name)
            assert region.read() == data.ljust(2 * PAGE, b"\0")


@drivers
def test_file_that_grows_and_is_replaced(driver: str) -> None:
    run_child(appended, driver)


def not_a_region() -> None:
    with Userfaultfd() as uffd, Handler(uffd) as handler, mmap.mmap(-1, PAGE) as mapping:
        for region in (mapping, bytearray(PAGE), PAGE):
            with pytest.raises(TypeError, match=r"Region\.at"):
                handler.serve(cast("Any", region), BufferSource(bytes(PAGE)))
        with pytest.raises(TypeError, match="from_fd"):
            Handler(cast("Any", uffd.fileno()))


def test_what_is_no_region_or_userfaultfd() -> None:
    run_child(not_a_region)


def fifo(writable: bool, shared: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/fifo"
        os.mkfifo(path)
        with pytest.raises(ValueError, match="regular file"):
            Region.file(path, PAGE, writable=writable, shared=shared)
        with pytest.raises(ValueError, match="pipe"):
            FileSource(path)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_named_pipe_is_refused_at_once(writable: bool, shared: bool) -> None:
    """Opening a FIFO for reading waits until it is opened for writing."""
    run_child(fifo, writable, shared)


def write_protect_a_device_mapping() -> None:
    with loop_device(2 * PAGE) as device:
        fd = os.open(device.path, os.O_RDWR)
        with pytest.raises(ValueError, match="regular file"):
            Region.file(fd)
        os.close(fd)
        with (
            Userfaultfd() as uffd,
            open(device.path, "r+b") as file,
            mmap.mmap(file.fileno(), 2 * PAGE) as mapping,
        ):
            source = BufferSource(mapping)
            with Region.at(source.address, PAGE) as region, pytest.raises(OSError):
                uffd.register(region, mode=RegisterMode.WP)
            del source


@needs_loop_device()
def test_mapping_of_a_block_device_cannot_be_registered() -> None:
    run_child(write_protect_a_device_mapping)
