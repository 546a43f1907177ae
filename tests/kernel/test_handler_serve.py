"""Handler.serve(): what it refuses, with the values in hex, leaving nothing behind."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Feature,
    FileSource,
    Handler,
    RangeBusyError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._memory import PAGE
from tests.kernel._serving import Driver, both_drivers, handler_of, open_fds, thread_names

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
HUGE = 2 << 20


@pytest.fixture(params=["native", "inline"])
def handler(request: pytest.FixtureRequest) -> Iterator[Handler]:
    driver: Driver = request.param
    with handler_of(driver) as handler:
        yield handler


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(4 * PAGE) as region:
        yield region


def mappings() -> list[str]:
    """Return the mappings of files, which the growth of the heap does not change."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]


def is_registered(region: Region) -> bool:
    """Whether any userfaultfd has the range, by trying to register it with another one."""
    with Userfaultfd() as other:
        try:
            other.register(region)
        except RangeBusyError:
            return True
        other.unregister(region)
        return False


def own_threads() -> list[str]:
    """Return the names of the threads without the watching one, which comes and goes."""
    return [name for name in thread_names() if name != "uffd-watch"]


def refused(
    handler: Handler,
    error: type[Exception],
    call: Callable[[], object],
    *values: int,
    region: Region | None = None,
) -> None:
    """Check an error, that its text has the values in hex, and that nothing is left."""
    before = (open_fds(), own_threads(), mappings(), repr(handler))
    with pytest.raises(error) as caught:
        call()
    for value in values:
        assert f"{value:#x}" in str(caught.value)
    assert (open_fds(), own_threads(), mappings(), repr(handler)) == before
    if region is not None:
        assert not is_registered(region)


def part(region: Region, first: int, pages: int) -> Any:
    return SimpleNamespace(start=region.start + first * PAGE, length=pages * PAGE, page_size=PAGE)


def test_served_already(handler: Handler, region: Region) -> None:
    handler.serve(region, ZeroSource())
    refused(handler, ValueError, lambda: handler.serve(region, ZeroSource()), region.start)
    assert is_registered(region)


@pytest.mark.parametrize(("first", "pages"), [(0, 1), (1, 2), (2, 2), (3, 1)])
def test_overlap(handler: Handler, region: Region, first: int, pages: int) -> None:
    handler.serve(part(region, 1, 2), ZeroSource())
    overlaps = first < 3 and first + pages > 1
    if not overlaps:
        handler.serve(part(region, first, pages), ZeroSource())
        return
    range_ = part(region, first, pages)
    refused(handler, ValueError, lambda: handler.serve(range_, ZeroSource()), range_.start)


def test_overlap_around(handler: Handler, region: Region) -> None:
    handler.serve(part(region, 1, 2), ZeroSource())
    refused(handler, ValueError, lambda: handler.serve(region, ZeroSource()), region.start)


@pytest.mark.parametrize("driver", ["native", "inline"])
def test_registered_by_another_userfaultfd(driver: Driver, region: Region) -> None:
    with handler_of(driver) as first, handler_of("native") as second:
        first.serve(region, ZeroSource())
        error = RangeBusyError if driver == "native" else (RangeBusyError, ValueError)
        refused(second, error, lambda: second.serve(region, ZeroSource()), region.start)  # type: ignore[arg-type]
        first.unserve(region)
        second.serve(region, ZeroSource())


@pytest.mark.parametrize("length", [1, PAGE, 3 * PAGE])
def test_source_too_short(handler: Handler, region: Region, length: int) -> None:
    source = BufferSource(b"a" * length)
    refused(
        handler,
        ValueError,
        lambda: handler.serve(region, source),
        length,
        region.length,
        region=region,
    )


def test_file_too_short(handler: Handler, region: Region) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(3 * PAGE + 100))
        with FileSource(file, offset=100) as source:
            refused(
                handler,
                ValueError,
                lambda: handler.serve(region, source),
                3 * PAGE,
                region.length,
                region=region,
            )
        with FileSource(file, offset=99) as source:
            handler.serve(region, source)


def test_source_inside_served_range(handler: Handler, region: Region) -> None:
    def check() -> None:
        source = BufferSource(region.memoryview())
        refused(
            handler, ValueError, lambda: handler.serve(region, source), region.start, region=region
        )
        last = part(region, 3, 1)
        handler.serve(last, ZeroSource())
        with Region.anonymous(PAGE) as other:
            refused(
                handler,
                ValueError,
                lambda: handler.serve(other, source),
                last.start,
                region=other,
            )

    check()
    gc.collect()  # the tracebacks refer to the source, which refers to the region


def test_source_that_needs_python(handler: Handler, region: Region) -> None:
    class Python:
        length = None

        def read(self, offset: int, length: int) -> bytes:
            del offset
            return bytes(length)

    refused(handler, ValueError, lambda: handler.serve(region, Python()), region=region)


def test_closed_source(handler: Handler, region: Region) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(4 * PAGE))
        source = FileSource(file)
        source.close()
        refused(handler, ClosedError, lambda: handler.serve(region, source), region=region)


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        (RegisterMode(0), ZeroSource()),
        (RegisterMode(1 << 3), ZeroSource()),
        (RegisterMode(1 << 20) | MISSING, ZeroSource()),
        (MISSING, None),
        (MISSING | WP, None),
        (MISSING | MINOR, None),
        (WP, ZeroSource()),
    ],
    ids=str,
)
def test_mode_that_does_not_go(
    handler: Handler, region: Region, mode: RegisterMode, source: ZeroSource | None
) -> None:
    refused(handler, ValueError, lambda: handler.serve(region, source, mode=mode), region=region)


def test_preserve(handler: Handler, region: Region) -> None:
    short, readonly = bytearray(region.length - 1), bytes(region.length)
    enough = bytearray(region.length)

    def serve(preserve: bytes | bytearray, mode: RegisterMode = WP) -> Callable[[], object]:
        source = None if mode == WP else ZeroSource()
        return lambda: handler.serve(region, source, mode=mode, preserve=preserve)

    refused(handler, ValueError, serve(short), len(short), region.length, region=region)
    refused(handler, ValueError, serve(readonly), region=region)
    refused(handler, ValueError, serve(enough, MISSING), region=region)
    refused(handler, ValueError, serve(enough, MISSING | WP), region=region)
    enough.append(0)  # it has no references
    handler.serve(region, None, mode=WP)
    refused(handler, ValueError, lambda: handler.preserve(region), region.start)


def test_writeprotect_of_what_is_not_served_for_it(handler: Handler, region: Region) -> None:
    refused(handler, ValueError, lambda: handler.writeprotect(region), region.start)
    handler.serve(region, ZeroSource())
    refused(handler, ValueError, lambda: handler.writeprotect(region), region.start)


def test_minor_faults_of_memory_without_page_cache(handler: Handler, region: Region) -> None:
    refused(handler, UffdOSError, lambda: handler.serve(region, None, mode=MINOR), region=region)


def test_minor_faults_with_a_source_need_a_second_mapping(handler: Handler) -> None:
    with Region.memfd(2 * PAGE, shared=False) as private, Region.memfd(2 * PAGE) as shared:
        source = ZeroSource()
        refused(
            handler,
            ValueError,
            lambda: handler.serve(private, source, mode=MINOR),
            region=private,
        )
        refused(
            handler,
            ValueError,
            lambda: handler.serve(part(shared, 0, 2), source, mode=MINOR),
            region=shared,
        )
        refused(
            handler,
            ValueError,
            lambda: handler.serve(shared, source, mode=MINOR, local=part(shared, 0, 1)),
            PAGE,
            2 * PAGE,
            region=shared,
        )


def test_alias_goes_when_registering_fails(handler: Handler) -> None:
    with Region.memfd(2 * PAGE) as region, Userfaultfd() as other:
        other.register(region)
        refused(
            handler,
            RangeBusyError,
            lambda: handler.serve(region, ZeroSource(), mode=MINOR),
            region.start,
        )
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(bytes(2 * PAGE))
            with FileSource(file) as source:
                refused(
                    handler, RangeBusyError, lambda: handler.serve(region, source), region.start
                )
        other.unregister(region)
        handler.serve(region, ZeroSource())


@pytest.mark.parametrize(
    ("start", "length", "page_size", "shown"),
    [
        (0x1001, PAGE, PAGE, 0x1001),
        (0x10000, PAGE + 1, PAGE, PAGE + 1),
        (0x10000, 0, PAGE, 0),
        (-PAGE, PAGE, PAGE, -PAGE),
        (0x10000, -PAGE, PAGE, -PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, PAGE, (1 << 64) - PAGE),
        (1 << 64, PAGE, PAGE, 1 << 64),
        (HUGE, PAGE, HUGE, PAGE),
        (HUGE + PAGE, HUGE, HUGE, HUGE + PAGE),
        (0x10000, PAGE, 8192, 8192),
    ],
)
def test_bad_range(handler: Handler, start: int, length: int, page_size: int, shown: int) -> None:
    bad = SimpleNamespace(start=start, length=length, page_size=page_size)
    refused(handler, ValueError, lambda: handler.serve(bad, ZeroSource()), shown)


def test_unmapped_range(handler: Handler) -> None:
    with Region.anonymous(PAGE) as region:
        gone = part(region, 0, 1)
    refused(handler, UffdOSError, lambda: handler.serve(gone, ZeroSource()), gone.start)


def test_closed_region(handler: Handler) -> None:
    region = Region.anonymous(PAGE)
    region.close()
    refused(handler, ClosedError, lambda: handler.serve(region, ZeroSource()))


def test_closed_userfaultfd(region: Region) -> None:
    uffd = Userfaultfd()
    uffd.close()
    with pytest.raises(ClosedError):
        Handler(uffd)
    uffd = Userfaultfd()
    handler = Handler(uffd)
    os.close(uffd.detach())
    with pytest.raises(ClosedError):
        handler.serve(region, ZeroSource())
    with pytest.raises(ClosedError):
        handler.start()


def test_unknown_regions(handler: Handler, region: Region) -> None:
    calls: list[Callable[[], object]] = [
        lambda: handler.unserve(region),
        lambda: handler.unserve(region.start),
        lambda: handler.populate(region),
        lambda: handler.page_states(region),
        lambda: handler.preserve(region),
    ]
    for call in calls:
        refused(handler, ValueError, call, region.start)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param("EVENT_FORK", marks=needs(Feature.EVENT_FORK)),
        *("EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP"),
    ],
)
def test_layout_events_do_not_go_with_inline(event: str) -> None:
    fds = open_fds()
    features = Feature[event] | Feature.SIGBUS
    with Userfaultfd(features=features) as uffd, pytest.raises(ValueError):
        Handler(uffd)
    assert open_fds() == fds


def test_blocking_userfaultfd() -> None:
    with Userfaultfd(nonblocking=False) as uffd, pytest.raises(ValueError):
        Handler(uffd, driver="native")
    with Userfaultfd(nonblocking=False, features=Feature.SIGBUS) as uffd:
        Handler(uffd, driver="inline").stop()


@both_drivers
def test_driver_needs_its_feature(driver: Driver) -> None:
    features = Feature(0) if driver == "inline" else Feature.SIGBUS
    with Userfaultfd(features=features) as uffd, pytest.raises(ValueError):
        Handler(uffd, driver=driver)


def test_user_mode_only(region: Region) -> None:
    """It works, except for accesses by the kernel."""
    with Userfaultfd(user_mode_only=True) as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(b"u" * region.length))
        handler.start()
        assert handler.populate(region, 0, PAGE) == PAGE
