"""Overlays served by every driver on every memory type, against a model of bytes."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    OverlaySource,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    UffdPermissionError,
    Userfaultfd,
    ZeroSource,
)
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._loop import loop_device, needs_loop_device
from tests.kernel._serving import content, everywhere, is_lost, serving
from tests.process._process_sources import page as page_of
from tests.seccomp_deny import deny_call

DRIVERS: Any = ("native", "inline", "thread", "process")
NR_PROCESS_VM_READV = 310

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR


@contextlib.contextmanager
def image(data: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.name


def random_overlay(
    rng: random.Random, size: int, path: str, data: bytes, *, unit: int, has_memory: bool
) -> tuple[OverlaySource, bytes]:
    """Return an overlay of a file, memory and zeros, and its expected content."""
    model = bytearray(size)
    pieces: list[tuple[int, int | None, Any]] = []
    for _ in range(rng.randrange(1, 12)):
        offset = rng.randrange(size // unit) * unit
        length = min(rng.randrange(1, 4) * unit, size - offset)
        kind = rng.choice(["file", "nested", "zeros", "memory"][: 3 + has_memory])
        at = rng.randrange(len(data) - length + 1)
        part = bytes(length) if kind == "zeros" else data[at : at + length]
        source: Any = FileSource(path, at)
        source._warns = False
        if kind == "nested":
            source = OverlaySource([(0, length, source)])
        elif kind == "zeros":
            source = ZeroSource()
        elif kind == "memory":
            source = bytearray(part)
        pieces.append((offset, length, source))
        model[offset : offset + length] = part
    return OverlaySource(pieces, gaps="zeros", length=size), bytes(model)


def combined(driver: str, name: str) -> list[tuple[RegisterMode, Feature, int]]:
    """Return modes, the features they need, and how much to prefetch."""
    cases = [(MISSING, Feature(0), 0), (MISSING | WP, Feature.WP_UNPOPULATED, 0)]
    if name in ("shmem", "hugetlb"):
        cases.append((MINOR, Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS, 0))
    cases.append((MISSING, Feature(0), 16 * PAGE))
    if name != "anon":
        cases[1] = (MISSING | WP, Feature.WP_HUGETLBFS_SHMEM, 0)
    return cases if driver != "process" else cases[::2]


def served_overlays(driver: Any, name: str) -> None:
    rng = random.Random(f"{driver}{name}")
    with image(data := content(1 << 16)) as path:
        for mode, features, prefetch in combined(driver, name):
            with serving(driver, name, features, prefetch=prefetch, autostart=True) as (
                handler,
                memory,
            ):
                handler.start()
                page = memory.page_size
                for unit in (page, 512, 1):
                    pages = 8 if page == PAGE else 1
                    region = memory.pages(pages)
                    size = pages * page - rng.choice([0, 100])
                    overlay, model = random_overlay(
                        rng,
                        size,
                        path,
                        data,
                        unit=min(unit, 4096),
                        has_memory=driver != "process",
                    )
                    handler.serve(region, overlay, mode=mode)
                    for at in rng.sample(range(size), 3):
                        assert region.read(at, 1) == model[at : at + 1]
                    if rng.random() < 0.5:
                        handler.populate(region)
                        assert PageState.ABSENT not in handler.page_states(region)
                    assert region.read() == model.ljust(region.length, b"\0")
                    region.write(size - 1, b"!")
                    handler.unserve(region)
                    assert region.read(0, size) == model[:-1] + b"!"


test_overlays = pytest.mark.crossing(everywhere(served_overlays, drivers=DRIVERS))


def truncated(driver: Any, mixed: bool) -> None:
    """Pages of a truncated file are lost, mixed ones too; those of other leaves are not."""
    with image(content(4 * PAGE)) as path, contextlib.ExitStack() as stack:
        file = stack.enter_context(FileSource(path))
        size = 4 * PAGE
        pieces: list[tuple[int, int | None, Any]] = [(0, None, file), (0, PAGE, ZeroSource())]
        if mixed:
            pieces.append((3 * PAGE, 100, ZeroSource()))
        handler, memory = stack.enter_context(serving(driver, "anon"))
        handler.start()
        region = memory.make(size)
        handler.serve(region, OverlaySource(pieces))
        assert region.read(PAGE, 1) == content(4 * PAGE)[PAGE : PAGE + 1]
        os.truncate(path, 2 * PAGE + 50)
        assert region.read(0, PAGE) == bytes(PAGE)
        assert is_lost(region, 3 * PAGE)
        assert is_lost(region, 2 * PAGE)
        states = handler.page_states(region)
        assert list(states[2:]) == [PageState.POISONED] * 2
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_a_truncated_file(driver: str, mixed: bool) -> None:
    run_child(truncated, driver, mixed)


def lost_memory(driver: Any) -> None:
    """Unreadable memory of a leaf is an error of the page, and no signal to the thread."""
    with (
        image(content(2 * PAGE)) as path,
        open(path, "r+b") as file,
        serving(driver, "anon") as (handler, memory),
    ):
        handler.start()
        region = memory.pages(3)
        source = BufferSource(mmap.mmap(file.fileno(), 2 * PAGE))
        overlay = OverlaySource(
            [(0, None, source), (PAGE, 10, b"0123456789"), (2 * PAGE, PAGE, ZeroSource())]
        )
        handler.serve(region, overlay)
        os.truncate(path, 0)
        assert is_lost(region, 0)
        assert is_lost(region, PAGE)
        assert region.read(2 * PAGE) == bytes(PAGE)
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.parametrize(
    "driver", [pytest.param("native", id="pitfall.5.overlay-of-lost-memory"), "thread"]
)
def test_memory_that_cannot_be_read(driver: str) -> None:
    run_child(lost_memory, driver)


def lost_memory_inline() -> None:
    with (
        image(content(PAGE)) as path,
        open(path, "r+b") as file,
        serving("inline", "anon") as (handler, memory),
    ):
        handler.start()
        region = memory.pages(1)
        source = BufferSource(mmap.mmap(file.fileno(), PAGE))
        handler.serve(region, OverlaySource([(0, None, source), (9, 1, b"x")]))
        os.truncate(path, 0)
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        with pytest.raises(HandlerError):
            handler.stop()


def test_memory_that_cannot_be_read_inline() -> None:
    """In the SIGBUS handler another SIGBUS would kill the process."""
    run_child(lost_memory_inline)


def shrunk_before_serve() -> None:
    with (
        image(content(2 * PAGE)) as path,
        FileSource(path) as file,
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        overlay = OverlaySource([(0, None, file)])
        os.truncate(path, PAGE)
        with pytest.raises(ValueError, match="by now"):
            handler.serve(region, overlay)
        with pytest.raises(ValueError, match="ends before"):
            handler.serve(region, OverlaySource([(0, PAGE, file)]))
        handler.serve(region, ZeroSource())
        assert region.read() == bytes(2 * PAGE)


def test_a_file_that_has_shrunk_is_refused() -> None:
    run_child(shrunk_before_serve)


def in_itself() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(4 * PAGE) as region,
        Region.anonymous(4 * PAGE) as other,
        Handler(uffd) as handler,
    ):
        overlay = OverlaySource([(0, None, b"x" * PAGE), (PAGE, None, region[PAGE:])])
        with pytest.raises(ValueError, match="lies inside"):
            handler.serve(region, overlay)
        handler.serve(other, overlay)
        with pytest.raises(ValueError, match="wait for each other"):
            handler.serve(region, ZeroSource())
        assert other.read() == b"x" * PAGE + bytes(3 * PAGE)


def test_memory_that_the_handler_serves_is_refused() -> None:
    run_child(in_itself)


def memory_of_one_process() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver="process") as handler,
    ):
        with pytest.raises(ValueError, match="memory of this process"):
            handler.serve(region, OverlaySource([(0, 2 * PAGE, ZeroSource()), (0, None, b"x")]))
        handler.serve(region, OverlaySource([(0, 2 * PAGE, ZeroSource())]))
        assert region.read() == bytes(2 * PAGE)


def test_the_process_driver_refuses_memory() -> None:
    run_child(memory_of_one_process)


def many_files() -> None:
    """More files than one message can have are refused; as many as it can have arrive."""
    count = 60
    with (
        image(data := content(count)) as path,
        Userfaultfd() as uffd,
        Region.anonymous(PAGE) as region,
        Handler(uffd, driver="process") as handler,
    ):
        whole = [(at, 1, FileSource(path, at)) for at in range(count)]
        too_many = [(at, 1, FileSource(path, at % count)) for at in range(252)]
        with pytest.raises(ValueError, match="more than the 251"):
            handler.serve(region, OverlaySource(too_many))
        handler.serve(region, OverlaySource(whole))
        os.kill(handler._engine.pids()[1], signal.SIGKILL)  # type: ignore[union-attr]
        assert region.read(0, count) == data
        for _, _, source in whole + too_many:
            source.close()


def test_the_files_of_an_overlay_outlive_a_worker_process() -> None:
    run_child(many_files)


def from_python(driver: Any) -> None:
    """Python reads the pages that have bytes of its source, and whatever else is in them."""
    overlay = OverlaySource([(0, 4 * PAGE, CallableSource(page_of)), (100, PAGE, ZeroSource())])
    want = bytearray(page_of(0, 4 * PAGE))
    want[100 : 100 + PAGE] = bytes(PAGE)
    with serving(driver, "anon") as (handler, memory):
        handler.start()
        region = memory.pages(4)
        handler.serve(region, overlay)
        assert region.read() == want
        assert handler.stats().requests


def python_over_a_file(driver: Any) -> None:
    """The files of an overlay that Python reads are sent to the helper process, and to the next."""
    with (
        image(data := content(4 * PAGE)) as path,
        FileSource(path, 10) as first,
        serving(driver, "anon") as (handler, memory),
    ):
        handler.start()
        region = memory.pages(4)
        overlay = OverlaySource(
            [
                (0, 4 * PAGE - 10, first),
                (PAGE + 7, PAGE, CallableSource(page_of)),
                (3 * PAGE, PAGE, path),
            ]
        )
        want = bytearray(data[10:].ljust(4 * PAGE))
        want[PAGE + 7 : 2 * PAGE + 7] = page_of(0, PAGE)
        want[3 * PAGE :] = data[:PAGE]
        handler.serve(region, overlay)
        assert region.read(0, PAGE) == want[:PAGE]
        if driver == "process":
            os.kill(handler._engine.pids()[1], signal.SIGKILL)  # type: ignore[union-attr]
        assert region.read() == want
        assert handler.stats().requests


@pytest.mark.parametrize("driver", ["thread", "process"])
def test_a_source_in_python_over_a_file(driver: str) -> None:
    run_child(python_over_a_file, driver, budget_s=20)


def numbered(offset: int, length: int) -> bytes:
    """Content that differs from one piece of 8 bytes to the next."""
    return b"".join(at.to_bytes(8, "little") for at in range(offset, offset + length, 8))


ASKED = (2, 3)  # of six pages: the first one is all from Python, the second has some bytes of it


def python_beside_c(first: FileSource, size: int, driver: Any) -> OverlaySource:
    pieces: list[Any] = [
        (0, 6 * size, first),
        (2 * size, size, CallableSource(numbered)),
        (3 * size + 100, 200, CallableSource(numbered)),
        (5 * size, size, ZeroSource()),
        (3 * size - 100, 50, first),
    ]
    if (
        driver == "thread"
    ):  # of the process driver it would be a third page that Python is asked for
        pieces.append((4 * size + 8, 16, b"memory of process"))
    return OverlaySource(pieces)


def asked_by_page(driver: Any, name: str) -> None:
    """Python is asked for its pages only, by faults, by populate, and with prefetch."""
    for mode, features, prefetch in combined(driver, name):
        size = 2 << 20 if name.startswith("hugetlb") else PAGE
        with (
            image(content(6 * size)) as path,
            FileSource(path) as first,
            serving(driver, name, features, prefetch=prefetch) as (handler, memory),
        ):
            handler.start()
            overlay = python_beside_c(first, size, driver)
            want = overlay.read(0, 6 * size)
            region = memory.pages(6)
            handler.serve(region, overlay, mode=mode)
            for page in (0, 5, 1, 4):
                assert region.read(page * size, size) == want[page * size : (page + 1) * size]
            assert handler.stats().requests == 0
            assert region.read() == want
            assert 1 <= handler.stats().requests <= len(ASKED)
            other = memory.pages(6)
            before = handler.stats().requests
            handler.serve(other, overlay, mode=mode)
            assert handler.populate(other) == 6 * size
            assert 1 <= handler.stats().requests - before <= len(ASKED)
            assert other.read() == want


@pytest.mark.crossing
@pytest.mark.parametrize("driver", ["thread", "process"])
@pytest.mark.parametrize("name", memory_params())
def test_python_is_asked_for_its_pages_only(driver: str, name: str) -> None:
    run_child(asked_by_page, driver, name, budget_s=30)


def truncated_beside_python(driver: Any) -> None:
    """What a file has lost is not asked of Python, and the other pages are there."""
    with (
        image(content(6 * PAGE)) as path,
        FileSource(path) as first,
        serving(driver, "anon") as (handler, memory),
    ):
        handler.start()
        region = memory.pages(6)
        overlay = python_beside_c(first, PAGE, driver)
        want = overlay.read(0, 6 * PAGE)
        handler.serve(region, overlay)
        os.truncate(path, 0)
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        assert region.read(5 * PAGE, PAGE) == want[5 * PAGE :]
        assert handler.stats().requests == 0
        assert region.read(2 * PAGE, 8) == want[2 * PAGE : 2 * PAGE + 8]
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.parametrize("driver", ["thread", "process"])
def test_a_truncated_file_beside_python(driver: str) -> None:
    run_child(truncated_beside_python, driver)


def one_thread_reads_c(driver: Any) -> None:
    """The only worker may read pages of its own region that C fills; it waits for no other."""
    size, got = PAGE, list[bytes]()
    with (
        image(content(2 * PAGE)) as path,
        FileSource(path) as first,
        serving(driver, "anon", workers=1) as (handler, memory),
    ):
        region = memory.pages(2)

        def read(offset: int, length: int) -> bytes:
            got.append(region.read(0, size))
            return bytes([7]) * length

        handler.start()
        handler.serve(
            region, OverlaySource([(0, 2 * size, first), (size, size, CallableSource(read))])
        )
        assert region.read(size, 1) == b"\7"
        assert got == [content(2 * size)[:size]]


def test_a_source_reads_what_c_fills() -> None:
    run_child(one_thread_reads_c, "thread")


def block_device(driver: Any) -> None:
    data = content(4 * PAGE)
    with loop_device(len(data)) as device, serving(driver, "anon") as (handler, memory):
        device.write(data)
        handler.start()
        region = memory.pages(4)
        overlay = OverlaySource([(0, None, device.path), (PAGE, 3, ZeroSource())])
        handler.serve(region, overlay)
        want = data[:PAGE] + bytes(3) + data[PAGE + 3 :]
        assert region.read() == want


@needs_loop_device()
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_block_device_among_them(driver: str) -> None:
    run_child(block_device, driver)


@pytest.mark.parametrize("driver", ["thread", "process"])
def test_a_source_in_python_among_them(driver: str) -> None:
    run_child(from_python, driver)


def refused_copying() -> None:
    deny_call(NR_PROCESS_VM_READV)
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        with pytest.raises(UffdPermissionError, match="process_vm_readv"):
            handler.serve(region, OverlaySource([(0, 2 * PAGE, ZeroSource()), (9, None, b"x")]))
        handler.serve(region, OverlaySource([(0, PAGE, ZeroSource()), (PAGE, None, b"x" * PAGE)]))
        assert region.read() == bytes(PAGE) + b"x" * PAGE
        handler.unserve(region)
        data = bytearray(b"x" * (PAGE + 9))
        handler.serve(region, data, present="drop")
        assert region.read() == data + bytes(PAGE - 9)
        # A source that ends inside a page was copied there, so that page stays.
        assert handler.evict(region, write_back=None) == PAGE
        assert region.read() == data + bytes(PAGE - 9)


def test_a_filter_that_refuses_copying_is_named_before_a_page_needs_it() -> None:
    run_child(refused_copying)
