"""The GIL table of docs/concepts/gil.md: each cell is tried.

A cell that says "hangs" is tried in a child of its own, which has to be killed; the others of a
column share a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FillResult,
    Fork,
    Handler,
    Pagefault,
    Region,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests import _readme
from tests._child import run_child
from tests._gil import needs_gil

PAGE = 4096
LENGTH = 64 * PAGE
BYTE = b"p"
CONTENT = BYTE * LENGTH
HANG_S = 1.0

PYTHON, NATIVE, PROCESS, INLINE = "Python thread", "native", "process", "inline"
COLUMNS = [PYTHON, NATIVE, PROCESS, INLINE]
WITHOUT_GIL = "Python thread, no GIL"

Action = Callable[[Region, mmap.mmap], None]
ACTIONS: dict[str, Action] = {}
FEATURES: dict[str, Feature] = {}


def action(row: str, features: Feature = Feature(0)) -> Callable[[Action], Action]:  # noqa: B008
    """Mark a function as the action of a row.

    It gets a region with missing pages, which is the memory of the mmap object.
    """

    def note(function: Action) -> Action:
        ACTIONS[row], FEATURES[row] = function, features
        return function

    return note


@action("`region.read()`, `.write()`, `.fill()`, `.touch()`, `.digest()`")
def _region_methods(region: Region, mapping: mmap.mmap) -> None:
    assert region.read(0, 1) == BYTE
    region.write(PAGE, b"x")
    region.fill(1, 2 * PAGE, PAGE)
    region.touch(3 * PAGE, PAGE)
    region.digest("sha256", 4 * PAGE)


@action("`view[0]`, a slice's `bytes()`, of `region.memoryview()`")
def _memoryview(region: Region, mapping: mmap.mmap) -> None:
    with region.memoryview() as view, view[PAGE : PAGE + 4] as part:
        assert bytes(part) == BYTE * 4
        assert view[0] == BYTE[0]


@action("numpy: `array[0]`, `array.sum()`")
def _numpy(region: Region, mapping: mmap.mmap) -> None:
    array = np.asarray(region)
    assert array[:PAGE].sum() == PAGE * BYTE[0]


@action("`mmap` objects: `m[0]`, `m.find()`")
def _mmap_object(region: Region, mapping: mmap.mmap) -> None:
    assert mapping.find(BYTE) == 0
    assert mapping[PAGE] == BYTE[0]


@action("`ctypes.string_at()`")
def _string_at(region: Region, mapping: mmap.mmap) -> None:
    assert ctypes.string_at(region.start, 1) == BYTE


@action("cffi: `ffi.memmove()`, `ffi.buffer()[:]`")
def _ffi(region: Region, mapping: mmap.mmap) -> None:
    from cffi import FFI

    ffi = FFI()
    target = bytearray(PAGE)
    ffi.memmove(target, ffi.cast("char *", region.start), PAGE)
    assert target == BYTE * PAGE


@action("`ctypes.memmove()`, a C function called by ctypes or cffi")
def _foreign_function(region: Region, mapping: mmap.mmap) -> None:
    target = ctypes.create_string_buffer(PAGE)
    ctypes.memmove(target, region.start, PAGE)
    libc = ctypes.CDLL(None)
    libc.memset(ctypes.c_void_p(region.start + PAGE), 1, ctypes.c_size_t(PAGE))
    assert target.raw == BYTE * PAGE


@action("`hashlib` over 2 KiB or more")
def _hashlib(region: Region, mapping: mmap.mmap) -> None:
    with region.memoryview() as view:
        assert hashlib.sha256(view).digest() == hashlib.sha256(CONTENT).digest()


@action("system calls: `os.readv()` into it, `os.write()` from it")
def _system_calls(region: Region, mapping: mmap.mmap) -> None:
    file = os.memfd_create("source")
    try:
        with region.memoryview() as view, view[:PAGE] as part, view[PAGE : 2 * PAGE] as rest:
            assert os.write(file, part) == PAGE
            os.lseek(file, 0, os.SEEK_SET)
            assert os.readv(file, [rest]) == PAGE
    finally:
        os.close(file)


@action("`region.madvise()` with `EVENT_REMOVE`", Feature.EVENT_REMOVE)
def _madvise(region: Region, mapping: mmap.mmap) -> None:
    region.madvise(mmap.MADV_DONTNEED)


@action("`os.fork()` with `EVENT_FORK`", Feature.EVENT_FORK)
def _fork(region: Region, mapping: mmap.mmap) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@action("`subprocess.run()` with `EVENT_FORK`", Feature.EVENT_FORK)
def _subprocess(region: Region, mapping: mmap.mmap) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


@contextlib.contextmanager
def served_by_python(region: Region, features: Feature) -> Iterator[None]:
    """Serve a region with a thread of this process that runs Python code."""
    stop_fd = os.eventfd(0)
    with Userfaultfd(features=features) as uffd:
        uffd.register(region)
        thread = threading.Thread(target=_python_loop, args=(uffd, stop_fd))
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(stop_fd, 1)
            thread.join()
            os.close(stop_fd)


def _python_loop(uffd: Userfaultfd, stop_fd: int) -> None:
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    content = BYTE * PAGE
    while stop_fd not in dict(poll.poll()):
        for event in uffd.read_events():
            match event:
                case Pagefault(address):
                    uffd.fill_copy(address // PAGE * PAGE, content)
                case Fork(child):
                    child.close()


class Handlers:
    """A handler of a driver for each set of features; with "process" it calls Python."""

    def __init__(self, driver: str, stack: contextlib.ExitStack) -> None:
        self._driver = driver
        self._stack = stack
        self._by_features: dict[Feature, Handler] = {}

    @contextlib.contextmanager
    def served(self, region: Region, features: Feature) -> Iterator[None]:
        """Serve a region, by the handler that is there or a new one."""
        driver = self._driver
        source = CallableSource(some_bytes) if driver == PROCESS else BufferSource(CONTENT)
        handler = self._by_features.get(features)
        if handler is None:
            more = Feature.SIGBUS if driver == INLINE else Feature(0)
            uffd = self._stack.enter_context(Userfaultfd(features=features | more))
            handler = self._stack.enter_context(Handler(uffd))
            handler.serve(region, source)
            handler.start()
            self._by_features[features] = handler
        else:
            handler.serve(region, source)
        assert handler.driver == driver
        try:
            yield
        finally:
            handler.unserve(region)


def some_bytes(offset: int, length: int) -> bytes:
    """Return the part of CONTENT there."""
    del offset
    return BYTE * length


def measure(column: str, rows: list[str]) -> dict[str, str]:
    """Do the actions of some rows; return the matching cell of the table for each."""
    found = {}
    with contextlib.ExitStack() as stack:
        handlers = Handlers(column, stack)
        for row in rows:
            print(row, flush=True)
            features = FEATURES[row]
            mapping = mmap.mmap(-1, LENGTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            with Region.at(address, LENGTH, PAGE) as region:
                try:
                    if column == PYTHON:
                        serving = served_by_python(region, features)
                    else:
                        serving = handlers.served(region, features)
                    with serving:
                        ACTIONS[row](region, mapping)
                    found[row] = "works"
                except OSError as error:
                    found[row] = errno.errorcode[error.errno or 0]
                except ValueError:
                    found[row] = "refused"
    return found


TABLE = _readme.table("gil")
HANGING = [(row, column) for row in TABLE for column in COLUMNS if TABLE[row][column] == "hangs"]


def test_the_table_has_every_row_and_column() -> None:
    assert list(TABLE) == list(ACTIONS)
    assert {tuple(cells) for cells in TABLE.values()} == {(PYTHON, WITHOUT_GIL, *COLUMNS[1:])}


@needs(Feature.SIGBUS | Feature.EVENT_FORK | Feature.EVENT_REMOVE)
@pytest.mark.parametrize("column", COLUMNS)
def test_what_does_not_hang(column: str) -> None:
    expected = {row: cells[column] for row, cells in TABLE.items() if cells[column] != "hangs"}
    assert run_child(measure, column, list(expected), budget_s=30).value == expected


@needs_gil(there=True)
@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize(("row", "column"), HANGING)
def test_what_hangs(row: str, column: str) -> None:
    result = run_child(measure, column, [row], budget_s=HANG_S, expect="timeout")
    assert result.stdout == f"{row}\n"


def collecting_source() -> None:
    def source(offset: int, length: int) -> bytes:
        gc.collect()
        return BYTE * length

    with (
        Userfaultfd() as uffd,
        Region.anonymous(LENGTH) as region,
        Handler(uffd, driver="thread", stall_timeout_s=HANG_S) as handler,
    ):
        handler.serve(region, CallableSource(source))
        region.memoryview()[0]


@needs_gil(there=False)
def test_a_wait_without_the_gil_ends_too() -> None:
    """With the thread driver, by poison when the source has not answered in time."""
    result = run_child(collecting_source, budget_s=30, expect=-signal.SIGBUS)
    assert "has not answered in time" in result.stderr


@needs_gil(there=False)
@needs(Feature.EVENT_FORK | Feature.EVENT_REMOVE)
def test_what_works_without_the_gil() -> None:
    rows = [row for row, cells in TABLE.items() if cells[WITHOUT_GIL] == "works"]
    assert run_child(measure, PYTHON, rows, budget_s=30).value == dict.fromkeys(rows, "works")


@needs_gil(there=False)
@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize(
    "row", [row for row, cells in TABLE.items() if cells[WITHOUT_GIL] == "hangs"]
)
def test_what_hangs_without_the_gil(row: str) -> None:
    result = run_child(measure, PYTHON, [row], budget_s=HANG_S, expect="timeout")
    assert result.stdout == f"{row}\n"


def stopping_all(row: str) -> None:
    """The loop collects garbage before it answers, as any allocation may."""
    fill = Userfaultfd.fill_copy

    def fill_later(uffd: Userfaultfd, *arguments: Any, **more: Any) -> FillResult:
        gc.collect()
        return fill(uffd, *arguments, **more)

    with mock.patch.object(Userfaultfd, "fill_copy", fill_later):
        measure(PYTHON, [row])


# Whatever stops all threads waits for one that is in Python code, and so in a page fault.
@needs_gil(there=False)
@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize("row", [row for row, column in HANGING if column == PYTHON])
def test_what_hangs_if_the_loop_stops_all_threads(row: str) -> None:
    result = run_child(stopping_all, row, budget_s=HANG_S, expect="timeout")
    assert result.stdout == f"{row}\n"
