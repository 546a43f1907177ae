"""What a handler borrows can be resized and closed after stop(), whoever still has a reference."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.handlers._engine import Engine

PAGE = 4096
NULL = Path("/dev/null")


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@contextmanager
def _kept(handler: Handler) -> Iterator[object]:
    """Hold what a traceback or a thread of free-threaded Python may hold: the engine."""
    engine = handler._engine
    yield engine
    assert engine is not None


def _resize(buffer: bytearray | io.BytesIO) -> None:
    if isinstance(buffer, bytearray):
        buffer.append(0)
    else:
        buffer.truncate(0)


def _by_stop(handler: Handler, uffd: Userfaultfd, region: Region) -> None:
    handler.stop()


def _by_unserve(handler: Handler, uffd: Userfaultfd, region: Region) -> None:
    handler.unserve(region)


def _by_region(handler: Handler, uffd: Userfaultfd, region: Region) -> None:
    region.close()


def _by_uffd(handler: Handler, uffd: Userfaultfd, region: Region) -> None:
    uffd.close()


ENDS = {"stop": _by_stop, "unserve": _by_unserve, "region": _by_region, "uffd": _by_uffd}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("what", ["preserve", "source", "BytesIO"])
def test_buffers(what: str, end: str) -> None:
    buffer = io.BytesIO(b"s" * PAGE) if what == "BytesIO" else bytearray(b"s" * PAGE)
    is_source = what != "preserve"
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region, Handler(uffd) as handler:
        if is_source:
            handler.serve(region, buffer)
            assert region.read(0, 1) == b"s"
        else:
            handler.serve(region, None, mode=RegisterMode.WP, preserve=buffer)  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            _resize(buffer)
        with _kept(handler):
            ENDS[end](handler, uffd, region)
            _resize(buffer)


@pytest.mark.parametrize("end", ["stop", "unserve"])
def test_a_path_is_closed(end: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"s" * PAGE)
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region, Handler(uffd) as handler:
        handler.serve(region, path)
        assert _open_of(path) == 2  # the source's and the engine's
        with _kept(handler):
            ENDS[end](handler, uffd, region)
            assert _open_of(path) == 0


def test_the_descriptor_when_the_last_call_leaves() -> None:
    """Without another call of the library: what keeps the number from being reused is closed."""
    before = _open_of(NULL)
    with Userfaultfd() as uffd, Handler(uffd) as handler:
        assert isinstance(handler._engine, Engine)
        pointer = handler._engine._engine()  # as a call has it
        handler.stop()
        uffd.close()
        assert _open_of(NULL) == before + 1
        del pointer
        assert _open_of(NULL) == before


def _open_of(path: Path) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def test_sources_of_the_caller_stay() -> None:
    source = BufferSource(b"mine".ljust(PAGE))
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region, Handler(uffd) as handler:
        handler.serve(region, source)
        handler.stop()
    assert source.read(0, 4) == b"mine"


def _too_short(handler: Handler, region: Region, buffer: bytearray) -> None:
    handler.serve(region, None, mode=RegisterMode.WP, preserve=buffer)


def _wrong_mode(handler: Handler, region: Region, buffer: bytearray) -> None:
    handler.serve(region, buffer, mode=RegisterMode.WP)


def _present(handler: Handler, region: Region, buffer: bytearray) -> None:
    region.write(PAGE, b"here already")
    handler.serve(region, buffer)


@pytest.mark.parametrize("refused", [_too_short, _wrong_mode, _present])
def test_refused(refused: Callable[[Handler, Region, bytearray], None]) -> None:
    buffer = bytearray(PAGE if refused is _too_short else 2 * PAGE)
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region, Handler(uffd) as handler:
        with pytest.raises(ValueError, match=r"\w") as caught:
            refused(handler, region, buffer)
        buffer.append(0)  # while the traceback is alive
        assert str(caught.value)


def test_beside_a_source_that_raised() -> None:
    """The traceback of the exception that stop() raises has frames of the engine."""
    saved, image = bytearray(PAGE), bytearray(b"s" * PAGE)
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(3 * PAGE) as region,
    ):
        handler = Handler(uffd, driver="thread")
        handler.serve(region[:PAGE], _raises)
        handler.serve(region[PAGE : 2 * PAGE], image)
        handler.serve(region[2 * PAGE :], None, mode=RegisterMode.WP, preserve=saved)
        handler.start()
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        saved.append(0)
        image.append(0)
        assert caught.value.__cause__ is not None


def _raises(offset: int, length: int) -> bytes:
    raise ValueError("no such page")
