"""Open files as arguments: their bytes are not always those of their descriptor.

A file object may have a buffer, and may decode what its descriptor has.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import http.client
import io
import lzma
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

import pyuffd
from pyuffd import (
    Feature,
    FileSource,
    Handler,
    OverlaySource,
    PageState,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._memory import PAGE
from tests.kernel._serving import content
from tests.kernel._verbs import DRIVERS, MISSING, PAGES, TRACKING, WP, Driver, handling

DATA = content((PAGES + 2) * PAGE)
HEAD = b"a line before the pages\n"
COMPRESSED: dict[str, Callable[..., Any]] = {
    "gzip": gzip.open,
    "bz2": bz2.open,
    "lzma": lzma.open,
    "text-gzip": lambda path, mode: gzip.open(path, mode.replace("rb", "rt")),  # noqa: SIM115
}


# What is no plain file


@contextmanager
def served(driver: Driver = "native", source: Any = None) -> Iterator[tuple[Handler, Region]]:
    with handling(driver) as handler, Region.anonymous(PAGES * PAGE) as region:
        handler.serve(region, source or ZeroSource(), mode=MISSING | WP)
        yield handler, region


def evict_to(file: Any) -> None:
    with served() as (handler, region):
        handler.evict(region, write_back=file)


def fill_at(file: Any) -> None:
    with served() as (handler, region):
        handler.fill(region, 0, file, PAGE, data_offset=0)


USES: dict[str, Callable[[Any], Any]] = {
    "FileSource": FileSource,
    "lazy": pyuffd.lazy,
    "Region.file": lambda file: Region.file(file, PAGE),
    "write_back": evict_to,
    "data_offset": fill_at,
}


@needs(TRACKING)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", COMPRESSED)
def test_what_decodes_is_refused(name: str, use: str, tmp_path: Path) -> None:
    """Its descriptor has compressed bytes, which no page should get."""
    with COMPRESSED[name](tmp_path / "file", "wb") as file:
        file.write(DATA)
    with (
        COMPRESSED[name](tmp_path / "file", "rb") as file,
        pytest.raises(TypeError, match="may have other bytes"),
    ):
        USES[use](file)


def buffered(path: Path) -> Any:
    return open(path, "w+b")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "buffered": buffered,
    "text": lambda path: open(path, "w+", encoding="latin-1", newline=""),  # noqa: SIM115
    "named-temporary": lambda _: tempfile.NamedTemporaryFile(),  # noqa: SIM115
    "temporary": lambda _: tempfile.TemporaryFile(),  # noqa: SIM115
    "spooled": lambda _: tempfile.SpooledTemporaryFile(max_size=1 << 20),  # noqa: SIM115
}


@needs(Feature(0))
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_buffered_is_in_the_file_first(name: str, tmp_path: Path) -> None:
    with WRITERS[name](tmp_path / "file") as file:
        data = DATA[: PAGE + 100]
        file.write(data.decode("latin-1") if name == "text" else data)
        with pyuffd.lazy(file) as memory:
            assert memory.length == 2 * PAGE
            assert memory.read(0, len(data)) == data


def test_a_region_of_a_buffered_file(tmp_path: Path) -> None:
    with buffered(tmp_path / "file") as file:
        file.write(DATA[:100] + bytes(PAGE - 100))
        with Region.file(file, PAGE) as region:
            assert region.read(0, 100) == DATA[:100]


# Streams


class Rotating(socket.socket):
    """A socket that decodes, as one with TLS does."""

    def recv_into(self, buffer: Any, *args: Any) -> int:
        n = super().recv_into(buffer, *args)
        buffer[:n] = bytes(byte ^ 1 for byte in buffer[:n])
        return n


def sent(ended: ExitStack, data: bytes, kind: type[socket.socket] = socket.socket) -> Any:
    """Return a socket from which these bytes come, and no more."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(data)
    return ended.enter_context(kind(fileno=ours.detach()))


def file_read_before(ended: ExitStack, path: Path) -> Any:
    path.write_bytes(HEAD + DATA)
    file = ended.enter_context(path.open("rb"))
    assert file.readline() == HEAD
    return file


def pipe_read_before(ended: ExitStack, path: Path) -> Any:
    path.write_bytes(HEAD + DATA)
    process = ended.enter_context(subprocess.Popen(["cat", path], stdout=subprocess.PIPE))
    assert process.stdout is not None
    assert process.stdout.readline() == HEAD
    return process.stdout


def makefile_read_before(ended: ExitStack, _: Path) -> Any:
    file = ended.enter_context(sent(ended, HEAD + DATA).makefile("rb"))
    assert file.readline() == HEAD
    return file


def http_body(ended: ExitStack, _: Path) -> Any:
    """A body in chunks, the first of which came with the headers."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (1000, DATA[at : at + 1000]) for at in range(0, 20000, 1000)
    )
    response = http.client.HTTPResponse(sent(ended, head + chunks + b"0\r\n\r\n"))
    response.begin()
    return ended.enter_context(response)


def compressed(ended: ExitStack, path: Path) -> Any:
    with gzip.open(path, "wb") as file:
        file.write(DATA)
    return ended.enter_context(gzip.open(path, "rb"))


def nonblocking(ended: ExitStack, path: Path) -> Any:
    file = pipe_read_before(ended, path)
    os.set_blocking(file.fileno(), False)
    return file


STREAMS: dict[str, Callable[[ExitStack, Path], Any]] = {
    "file": file_read_before,
    "pipe": pipe_read_before,
    "pipe-nonblocking": nonblocking,
    "makefile": makefile_read_before,
    "http": http_body,
    "gzip": compressed,
    "memory": lambda *_: io.BytesIO(DATA),
    "decoding-socket": lambda ended, _: sent(ended, bytes(byte ^ 1 for byte in DATA), Rotating),
    "socket": lambda ended, _: sent(ended, DATA),
}


@needs(TRACKING)
@pytest.mark.parametrize("driver", DRIVERS)
def test_fill_reads_on_where_the_stream_is(driver: Driver, tmp_path: Path) -> None:
    with handling(driver) as handler:
        for number, (name, make) in enumerate(STREAMS.items()):
            with ExitStack() as ended, Region.anonymous(PAGES * PAGE) as region:
                handler.serve(region, ZeroSource())
                stream = make(ended, tmp_path / f"{number}")
                assert handler.fill(region, 0, stream, PAGE) == PAGE, name
                assert handler.fill(region, PAGE, stream, 2 * PAGE) == 2 * PAGE, name
                assert region.read(0, 3 * PAGE) == DATA[: 3 * PAGE], name
                if name == "file":
                    assert stream.tell() == len(HEAD) + 3 * PAGE


class Broken(io.RawIOBase):
    def readinto(self, buffer: Any) -> int:
        raise EOFError("compressed data ended")


class Miscounting(io.RawIOBase):
    def __init__(self, more: int) -> None:
        self.more = more

    def readinto(self, buffer: Any) -> int:
        return self.more if self.more < 0 else len(buffer) + self.more


@needs(TRACKING)
def test_streams_that_fail() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, served() as (handler, region):
        ours.settimeout(0.05)
        theirs.sendall(bytes(PAGE) + b"half a page")
        with pytest.raises(UffdOSError) as late:
            handler.fill(region, 0, ours, 2 * PAGE)
        with pytest.raises(UffdOSError) as broken:
            handler.fill(region, 0, Broken(), PAGE)
        with pytest.raises(UffdOSError) as short:
            handler.fill(region, 0, io.BytesIO(b"short"), PAGE)
        assert [error.value.errno for error in (late, broken, short)] == [
            errno.ETIMEDOUT,
            errno.EIO,
            errno.ENODATA,
        ]
        assert isinstance(late.value.__cause__, TimeoutError)
        assert isinstance(broken.value.__cause__, EOFError)
        with pytest.raises(TypeError, match="a StringIO cannot be read into memory"):
            handler.fill(region, 0, io.StringIO("text"), PAGE)
        for more in (-1, 1):
            with pytest.raises(UffdOSError) as wrong:
                handler.fill(region, 0, Miscounting(more), PAGE)
            assert wrong.value.errno == errno.EIO
            assert isinstance(wrong.value.__cause__, ValueError)
        assert handler.page_states(region)[0] == PageState.ABSENT


@needs(TRACKING)
def test_what_has_no_descriptor() -> None:
    with served() as (handler, region):
        for use in (
            lambda: handler.fill(region, 0, io.BytesIO(DATA), PAGE, data_offset=PAGE),
            lambda: handler.evict(region, write_back=io.BytesIO()),
            lambda: FileSource(io.StringIO()),  # type: ignore[arg-type]
        ):
            with pytest.raises(TypeError, match="has no descriptor"):
                use()


@needs(TRACKING)
def test_a_page_source_is_no_stream(tmp_path: Path) -> None:
    """Its descriptor is where it happens to be, and not at the source's offset."""
    (tmp_path / "file").write_bytes(DATA)
    with FileSource(tmp_path / "file", PAGE) as source, served() as (handler, region):
        for place in (None, 0):
            with pytest.raises(TypeError, match=r"data_offset=source\.offset"):
                handler.fill(region, 0, source, PAGE, data_offset=place)


# Where evict() writes


@contextmanager
def file_of_pages(path: Path) -> Iterator[IO[bytes]]:
    path.write_bytes(DATA)
    with path.open("r+b") as file:
        yield file


@needs(TRACKING)
def test_evict_to_where_the_source_reads(tmp_path: Path) -> None:
    with (
        file_of_pages(tmp_path / "file") as file,
        FileSource(file, 2 * PAGE) as source,
        served(source=source) as (handler, region),
    ):
        region.write(PAGE, b"new")
        with pytest.raises(ValueError, match="pass write_back=source"):
            handler.evict(region, write_back=file)
        assert handler.evict(region, write_back=source) == PAGE
        assert region.read(PAGE, 3) == b"new"
        place = 3 * PAGE
        assert (tmp_path / "file").read_bytes() == DATA[:place] + b"new" + DATA[place + 3 :]


@needs(TRACKING)
def test_evict_writes_what_the_file_has_buffered_first(tmp_path: Path) -> None:
    with (
        file_of_pages(tmp_path / "file") as file,
        FileSource(tmp_path / "file") as source,
        served(source=source) as (handler, region),
    ):
        file.seek(PAGE)
        file.write(b"old")
        region.write(PAGE, b"new")
        assert handler.evict(region, write_back=file) == PAGE
        file.flush()
        assert region.read(PAGE, 3) == b"new"


@needs(TRACKING)
def test_evict_refuses_a_file_open_for_appending(tmp_path: Path) -> None:
    """Linux would append the pages, whatever their offset."""
    (tmp_path / "file").write_bytes(DATA)
    with (
        (tmp_path / "file").open("ab") as file,
        FileSource(tmp_path / "file") as source,
        served(source=source) as (handler, region),
    ):
        region.write(0, b"new")
        with pytest.raises(ValueError, match="open for appending"):
            handler.evict(region, write_back=file)
        assert region.read(0, 3) == b"new"


@needs(TRACKING)
def test_evict_refuses_a_file_that_other_pieces_cover(tmp_path: Path) -> None:
    with file_of_pages(tmp_path / "file") as file, FileSource(file) as base:
        image = OverlaySource([(0, None, base), (PAGE, PAGE, b"p" * PAGE), (3 * PAGE, PAGE, base)])
        with served(source=image) as (handler, region):
            for page in range(PAGES):
                region.write(page * PAGE, b"new")
            for page, name in ((1, "BufferSource"), (3, "FileSource")):
                with pytest.raises(ValueError, match=name):
                    handler.evict(region, page * PAGE, PAGE, write_back=file)
            for page in (0, 2):
                assert handler.evict(region, page * PAGE, PAGE, write_back=file) == PAGE
            assert [region.read(page * PAGE, 3) for page in range(PAGES)] == [b"new"] * PAGES


@needs(Feature.SIGBUS | TRACKING)
def test_evict_inline(tmp_path: Path) -> None:
    with (
        file_of_pages(tmp_path / "file") as file,
        FileSource(file, PAGE) as source,
        Userfaultfd(features=TRACKING | Feature.SIGBUS) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd, driver="inline") as handler,
    ):
        handler.serve(region, source, mode=MISSING | WP)
        region.write(0, b"new")
        assert handler.evict(region, write_back=source) == PAGE
        assert region.read(0, 4) == b"new" + DATA[PAGE + 3 : PAGE + 4]
