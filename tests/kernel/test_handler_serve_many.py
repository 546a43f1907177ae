"""Many regions served by few calls in C: as `serve` does it, also where one of them cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from pyuffd import (
    CallableSource,
    FileSource,
    Handler,
    PageSource,
    Region,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.handlers import _serving_many
from tests._images import pattern
from tests._memory import PAGE

FEW = 5
Row = tuple[Region, PageSource]


@contextlib.contextmanager
def regions(count: int) -> Iterator[list[Region]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Region.anonymous(PAGE)) for _ in range(count)]


@pytest.fixture
def file() -> Iterator[Region]:
    with Region.memfd(FEW * PAGE) as region:
        region.write(0, pattern(FEW))
        yield region


def sources(file: Region, stack: contextlib.ExitStack) -> list[PageSource]:
    """Return one source for each page of a file."""
    fd = file.fd
    assert fd is not None
    return [stack.enter_context(FileSource(fd, offset=n * PAGE)) for n in range(FEW)]


def has(region: Region, page: int) -> bool:
    return region.read() == pattern(FEW)[page * PAGE :][:PAGE]


def registered(uffd: Userfaultfd, some: Sequence[Region]) -> list[bool]:
    return [uffd._has_registered(one.start, one.start + one.length) for one in some]


@pytest.mark.parametrize("started", [False, True])
def test_many_calls(file: Region, started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls, the last one not full; each region has its own content, and can be left."""
    monkeypatch.setattr(_serving_many, "_AT_ONCE", 2)
    with (
        contextlib.ExitStack() as stack,
        regions(FEW) as all_,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
    ):
        if started:
            handler.start()
        handler._serve_many(zip(all_, sources(file, stack), strict=True))
        handler.unserve(all_[1])
        assert registered(uffd, all_) == [True, False, True, True, True]
        handler.start()
        assert [has(all_[n], n) for n in (0, 2, 3, 4)] == [True] * 4
        assert handler.stats().filled_pages == 4


def test_region_closed(file: Region) -> None:
    """The handler lets a region go that is closed, and one that is moved by its address."""
    with (
        contextlib.ExitStack() as stack,
        regions(FEW) as all_,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
    ):
        handler._serve_many(zip(all_, sources(file, stack), strict=True))
        start = all_[0].start
        all_[0].close()
        assert not uffd._has_registered(start, start + PAGE)
        with pytest.raises(ValueError, match="no range"):
            handler.unserve(start)
        assert has(all_[1], 1)


@pytest.mark.parametrize("bad", ["served", "touched", "closed", "short", "busy"])
def test_one_cannot_be(file: Region, bad: str) -> None:
    """The ones before it are served, it and those behind it are as they were."""
    with (
        contextlib.ExitStack() as stack,
        regions(FEW) as all_,
        Userfaultfd() as uffd,
        Userfaultfd() as other,
        Handler(uffd) as handler,
    ):
        content = sources(file, stack)
        if bad == "served":
            handler.serve(all_[2], ZeroSource())
        elif bad == "touched":
            all_[2].write(0, b"mine")
        elif bad == "closed":
            all_[2].close()
        elif bad == "short":
            content[2] = content[4]
            all_[2] = stack.enter_context(Region.anonymous(3 * PAGE))
        else:
            other.register(all_[2])
        with pytest.raises((ValueError, OSError)):
            handler._serve_many(zip(all_, content, strict=True))
        assert registered(uffd, all_[:2]) == [True, True]
        assert registered(uffd, all_[3:]) == [False, False]
        assert has(all_[0], 0)
        assert has(all_[1], 1)
        if bad == "served":
            assert all_[2].read() == bytes(PAGE)
        elif bad == "touched":
            assert all_[2].read(0, 4) == b"mine"
        elif bad == "busy":
            other.unregister(all_[2])
            handler.serve(all_[2], content[2])
            assert has(all_[2], 2)


def test_one_in_python(file: Region) -> None:
    """A source in Python among them is served as always, by a driver that can."""
    with (
        contextlib.ExitStack() as stack,
        regions(FEW) as all_,
        Userfaultfd() as uffd,
        Handler(uffd, driver="thread") as handler,
    ):
        content = sources(file, stack)
        content[3] = CallableSource(lambda offset, length: pattern(FEW)[3 * PAGE :][:length])
        handler._serve_many(zip(all_, content, strict=True))
        handler.start()
        assert [has(region, number) for number, region in enumerate(all_)] == [True] * FEW
