"""Page sources without a handler: lengths, reads, bad arguments, ownership."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import socket
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    FileSource,
    PageSource,
    UffdPermissionError,
    ZeroSource,
)

DATA = bytes(range(256)) * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "pages"
    file.write_bytes(DATA)
    return file


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_zeros() -> None:
    source = ZeroSource()
    assert source.length is None
    assert source.read(1 << 50, 5) == bytes(5)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: array("B", data)])
def test_buffer(kind: type) -> None:
    source = BufferSource(kind(DATA))
    assert source.length == len(DATA)
    assert source.read(0, len(DATA)) == DATA
    assert source.read(100, 10) == DATA[100:110]


def test_buffer_length_is_in_bytes() -> None:
    assert BufferSource(array("Q", [1, 2, 3])).length == 24


def test_behind_the_end_are_zeros(path: Path) -> None:
    size = len(DATA)
    with FileSource(path) as file:
        for source in (BufferSource(DATA), file):
            assert source.read(size - 3, 10) == DATA[-3:] + bytes(7)
            assert source.read(size, 4) == bytes(4)
            assert source.read(10 * size, 4) == bytes(4)


def test_buffer_is_read_when_asked() -> None:
    data = bytearray(4096)
    source = BufferSource(data)
    data[7] = 9
    assert source.read(7, 1) == b"\x09"


def test_buffer_cannot_be_resized_under_the_source() -> None:
    data = bytearray(4096)
    source = BufferSource(data)
    with pytest.raises(BufferError):
        data.extend(b"more")
    del source
    gc.collect()
    data.extend(b"more")


def test_buffer_is_kept_alive() -> None:
    source = BufferSource(bytearray(b"\x05" * (1 << 20)))
    gc.collect()
    assert source.read(0, 1 << 20) == b"\x05" * (1 << 20)


def test_buffer_of_an_mmap() -> None:
    with mmap.mmap(-1, 4096) as mapping:
        mapping[10] = 3
        source = BufferSource(mapping)
        assert source.read(10, 1) == b"\x03"
        with pytest.raises(BufferError):
            mapping.close()
        del source
        gc.collect()


def test_empty_buffer() -> None:
    with pytest.raises(ValueError):
        BufferSource(b"")


def test_scattered_buffer() -> None:
    with pytest.raises(BufferError):
        BufferSource(memoryview(DATA)[::2])


@pytest.mark.parametrize("offset", [0, 1, 4096, len(DATA) - 1])
def test_file_offset(path: Path, offset: int) -> None:
    with FileSource(path, offset) as source:
        assert source.length == len(DATA) - offset
        assert source.read(0, len(DATA) - offset) == DATA[offset:]


def test_file_by_path_object_or_descriptor(path: Path) -> None:
    before = open_files()
    with (
        open(path, "rb") as file,
        FileSource(file) as by_object,
        FileSource(file.fileno()) as by_fd,
    ):
        file.close()
        for source in (by_object, by_fd):
            assert source.read(0, len(DATA)) == DATA
            assert source.name == str(path)
            assert not os.get_inheritable(source.fileno())
    assert open_files() == before


def test_file_that_grows_and_shrinks(path: Path) -> None:
    with FileSource(path, 4096) as source:
        os.truncate(path, 3 * 4096)
        assert source.length == 2 * 4096
        os.truncate(path, 100)
        assert source.length == 0
        assert source.read(0, 8) == bytes(8)


@pytest.mark.parametrize(
    ("offset", "shown"), [(-1, "-0x1"), (len(DATA), "0x2000"), (1 << 40, "0x10000000000")]
)
def test_bad_file_offset(path: Path, offset: int, shown: str) -> None:
    before = open_files()
    with pytest.raises(ValueError, match=shown):
        FileSource(path, offset)
    assert open_files() == before


@contextlib.contextmanager
def odd_file(kind: str, folder: Path) -> Iterator[int | str]:
    """Make a file of a kind that cannot be a source; yield a path or a descriptor."""
    with contextlib.ExitStack() as stack:
        if kind.startswith("/"):
            yield kind
        elif kind == "directory":
            yield str(folder)
        elif kind == "fifo":
            os.mkfifo(folder / "fifo")
            yield str(folder / "fifo")
        elif kind == "socket":
            yield stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
        else:
            fds: dict[str, Callable[[], tuple[int, ...]]] = {
                "pipe": os.pipe,
                "write-only": lambda: (os.open(folder / "pages", os.O_WRONLY),),
                "eventfd": lambda: (os.eventfd(0),),
                "pidfd": lambda: (os.pidfd_open(os.getpid()),),
            }
            made = fds[kind]()
            for fd in made:
                stack.callback(os.close, fd)
            yield made[0]


# kind, exception, what the text must name
ODD_FILES = [
    ("directory", ValueError, "directory"),
    ("fifo", ValueError, "pipe"),
    ("pipe", ValueError, "pipe"),
    ("socket", ValueError, "socket"),
    ("eventfd", ValueError, "size"),
    ("pidfd", ValueError, "size"),
    ("/dev/zero", ValueError, "ZeroSource"),
    ("/dev/null", ValueError, "character device"),
    ("/dev/urandom", ValueError, "character device"),
    ("/proc/self/maps", ValueError, "mapped"),
    ("/proc/meminfo", ValueError, "mapped"),
    ("/sys/kernel/mm/transparent_hugepage/enabled", ValueError, "mapped"),
    ("write-only", UffdPermissionError, "writing only"),
]


@pytest.mark.parametrize(("kind", "error", "named"), ODD_FILES)
def test_file_that_has_no_pages(path: Path, kind: str, error: type[Exception], named: str) -> None:
    if kind.startswith("/sys") and not Path(kind).exists():
        pytest.skip(f"no {kind}")
    before = open_files(), len(Path("/proc/self/maps").read_text().splitlines())
    with odd_file(kind, path.parent) as file, pytest.raises(error, match=named):
        FileSource(file)
    assert (open_files(), len(Path("/proc/self/maps").read_text().splitlines())) == before


def test_direct_io_needs_no_alignment(path: Path) -> None:
    """With O_DIRECT a read of a tail or offset that is no multiple of a sector would fail."""
    os.truncate(path, len(DATA) - 100)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with FileSource(fd, 1) as source:
            assert source.read(0, len(DATA) - 101) == DATA[1:-100]
    finally:
        os.close(fd)


def test_the_position_of_the_descriptor_stays(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(5)
        with FileSource(file) as source:
            assert source.read(0, 2) == DATA[:2]
            assert source.length == len(DATA)
        assert file.tell() == 5


def test_a_file_that_takes_its_path_is_not_looked_at(path: Path) -> None:
    with FileSource(path) as source:
        other = path.with_name("other")
        other.write_bytes(bytes(len(DATA)))
        other.rename(path)
        assert source.read(0, len(DATA)) == DATA


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "nothing")


def test_bad_descriptor() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        FileSource(10_000)


def test_use_after_close(path: Path) -> None:
    source = FileSource(path)
    source.close()
    source.close()
    assert "closed" in repr(source)
    for use in (source.fileno, lambda: source.read(0, 1), lambda: source.length):
        with pytest.raises(ClosedError):
            use()


def test_forgotten_source_warns_and_closes(path: Path) -> None:
    before = open_files()
    source = FileSource(path)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del source
        gc.collect()
    assert open_files() == before


def test_protocol(path: Path) -> None:
    with FileSource(path) as file:
        for source in (ZeroSource(), BufferSource(DATA), file):
            assert isinstance(source, PageSource)
    assert not isinstance(b"bytes", PageSource)
