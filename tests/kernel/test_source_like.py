"""What `serve` takes for a source: buffers, regions, paths, open files, functions; and what not."""

from __future__ import annotations

import gc
import io
import mmap
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    FileSource,
    Handler,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd._source_like import as_source
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import content
from tests.process._process_sources import page, page_later

DATA = content(2 * PAGE)
BUFFERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "array": lambda data: array("Q", data),
    "numpy": lambda data: np.frombuffer(data, np.int64).reshape(2, -1),
    "bytesio": io.BytesIO,
}


def nothing_is_registered(region: Region) -> bool:
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{region.start:x}-"):
            flags = "found"
        elif flags == "found" and line.startswith("VmFlags:"):
            return "um" not in line.split()
    raise AssertionError("not in smaps")


def check_served(source: Any, want: bytes) -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(len(want)) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, source)
        assert region.read() == want


def taken() -> None:
    for make in BUFFERS.values():
        check_served(make(DATA), DATA)
    with Region.memfd(4 * PAGE) as other:
        other.write(PAGE, DATA)
        check_served(other, other.read())
        check_served(other[PAGE : 3 * PAGE], DATA)
    mapping = mmap.mmap(-1, len(DATA))
    mapping[:] = DATA
    check_served(mapping, DATA)
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        check_served(file.name, DATA)
        check_served(Path(file.name), DATA)
        check_served(file, DATA)
        with open(file.name, "rb", buffering=0) as raw:
            check_served(raw, DATA)
    check_served(page, page(0, 2 * PAGE))
    check_served(page_later, page(0, 2 * PAGE))


def test_what_obviously_is_content_is_served() -> None:
    run_child(taken, budget_s=20)


def test_which_class_each_becomes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    for make in BUFFERS.values():
        assert type(as_source(make(DATA))) is BufferSource
    for file in (path, str(path)):
        assert type(as_source(file)) is FileSource
    assert type(as_source(page)) is CallableSource
    assert type(as_source(page_later)) is AsyncSource
    with Region.anonymous(PAGE) as region:  # it has read() and length, as a page source has
        assert type(as_source(region)) is BufferSource
    zeros = ZeroSource()
    assert as_source(zeros) is zeros


class NoLength:
    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "number": (5, TypeError, "FileSource"),
    "float": (1.5, TypeError, "BufferSource"),
    "list": ([1, 2], TypeError, "OverlaySource"),
    "class": (ZeroSource, TypeError, r"ZeroSource\(\.\.\.\)"),
    "no-length": (NoLength(), TypeError, "length"),
    "empty": (b"", ValueError, "empty"),
    "scattered": (memoryview(DATA)[::2], BufferError, "gaps"),
    "no-file": ("/nonexistent/file", FileNotFoundError, "nonexistent"),
    "pipe-like": ("/dev/zero", ValueError, "ZeroSource"),
    "text": (io.StringIO("text"), TypeError, "no descriptor"),
    "short": (b"x" * PAGE, ValueError, "ends before"),
}


def not_taken() -> None:
    for value, error, named in BAD.values():
        with (
            Userfaultfd() as uffd,
            Region.anonymous(2 * PAGE) as region,
            Handler(uffd) as handler,
        ):
            with pytest.raises(error, match=named):
                handler.serve(region, cast("Any", value))
            assert nothing_is_registered(region)
            handler.serve(region, ZeroSource())


def test_what_is_not_content_is_refused_before_anything_is_registered() -> None:
    run_child(not_taken)


def kept_alive() -> None:
    """The region that the content lies in may be closed, and a file that was opened is closed."""
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region, Handler(uffd) as handler:
        with Region.anonymous(2 * PAGE) as other:
            other.write(0, DATA)
            handler.serve(region, other)
        assert region.read() == DATA
    before = len(list(Path("/proc/self/fd").iterdir()))
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        check_served(file.name, DATA)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_the_content_lies_in_is_kept() -> None:
    run_child(kept_alive)


def preserved_in_a_region() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Region.anonymous(3 * PAGE) as kept,
        Region.anonymous(PAGE) as short,
        Handler(uffd) as handler,
    ):
        region.write(0, DATA)
        with pytest.raises(ValueError, match="fewer"):
            handler.serve(region, None, mode=RegisterMode.WP, preserve=short)
        with pytest.raises(ValueError, match="lies inside"):
            handler.serve(region, None, mode=RegisterMode.WP, preserve=region)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=kept[PAGE:])
        handler.writeprotect(region)
        region.write(5, b"new")
        handler.preserve(region)
        assert kept.read(PAGE) == DATA
        assert kept.read(0, PAGE) == bytes(PAGE)


def test_old_content_is_preserved_in_a_region() -> None:
    run_child(preserved_in_a_region)
