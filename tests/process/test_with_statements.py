"""The end of a with statement: the exception of its body is kept, and no page becomes zeros."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from typing import Any, Literal

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PageSource,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, is_lost

Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process")
PAGE = os.sysconf("SC_PAGE_SIZE")
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED

pytestmark = needs(Feature.POISON)


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.length = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class Broken:
    length = None

    def read(self, offset: int, length: int) -> bytes:
        raise ZeroDivisionError("a bug in the source")


def source(driver: Driver, data: bytes) -> PageSource:
    return BufferSource(data) if driver in ("native", "inline") else Bytes(data)


def uffd_for(driver: Driver, features: Feature = Feature(0)) -> Userfaultfd:  # noqa: B008
    return Userfaultfd(features=features | (Feature.SIGBUS if driver == "inline" else 0))


def flags_at(address: int) -> set[str]:
    """The VmFlags of a mapping."""
    found = False
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                found = start <= address < end
            elif found and words[0] == "VmFlags:":
                return set(words[1:])
    raise LookupError(hex(address))


# A view outlives its region, which is served


def view_of_served(driver: Driver, memory: str, protected: bool, adopted: bool) -> None:
    mode = RegisterMode.MISSING | (RegisterMode.WP if protected else 0)
    with (
        contextlib.closing(memory_of(memory)) as make,
        uffd_for(driver, WP if protected else Feature(0)) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        whole = make.pages(3)
        size, data = whole.page_size, content(whole.length)
        region = Region.at(whole.start, whole.length, size) if adopted else whole
        start = region.start
        handler.serve(region, source(driver, data), mode=mode)
        view = region.memoryview()
        assert region.read(size, 1) == data[size : size + 1]  # the thread driver needs the GIL
        region.close()
        assert not flags_at(start) & {"um", "uw", "ui"}
        assert bytes(view[size : 2 * size]) == data[size : 2 * size]
        view[size] = 7  # no protection is left
        there = Region.at(start, 3 * size, size)
        assert is_lost(there, 0)
        assert is_lost(there, 2 * size)
        del view


@pytest.mark.crossing
@pytest.mark.parametrize("adopted", [False, True], ids=["view", "adopted"])
@pytest.mark.parametrize("protected", [False, True], ids=["missing", "wp"])
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_no_zeros_where_memory_stays(
    driver: Driver, memory: str, protected: bool, adopted: bool
) -> None:
    run_child(view_of_served, driver, memory, protected, adopted)


# Two exceptions


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        logging.getLogger("pyuffd").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def serve_failing(driver: Driver, handler: Handler, region: Region) -> None:
    """Serve a region whose pages cannot be read."""
    if driver in ("thread", "process"):
        handler.serve(region, Broken())
        return
    with open(os.memfd_create("short"), "wb") as file:
        os.truncate(file.fileno(), PAGE)
        handler.serve(region, FileSource(file.fileno()))
        os.truncate(file.fileno(), 0)


def check_both(error: BaseException, records: Records) -> None:
    notes = "\n".join(getattr(error, "__notes__", []))
    assert "could not be read" in notes, notes
    assert any("could not be read" in text for text in records.texts), records.texts
    chain, at = [], error.__context__
    while at is not None:
        chain.append(at)
        at = at.__context__
    assert any(isinstance(one, HandlerError) for one in chain), chain


def body_and_handler(driver: Driver, first: str, context: bool) -> None:
    """`first`: the object that is closed first, while the exception propagates."""
    records = Records()
    caught: list[KeyError] = []
    try:
        with contextlib.ExitStack() as stack:
            uffd: Any = uffd_for(driver)
            region = Region.anonymous(PAGE)
            handler = Handler(uffd, driver=driver)
            stack.callback(region.close)
            if first == "handler":
                stack.enter_context(uffd)
                stack.enter_context(handler)
            else:
                handler.start()
                stack.enter_context(uffd)
            serve_failing(driver, handler, region)
            assert is_lost(region)
            try:
                if context:
                    raise ValueError("before")
            except ValueError:
                raise KeyError("mine") from None
            raise KeyError("mine")
    except KeyError as error:
        caught.append(error)
    assert [error.args for error in caught] == [("mine",)]
    check_both(caught[0], records)
    gc.collect()


@pytest.mark.crossing
@pytest.mark.parametrize("context", [False, True], ids=["alone", "with-a-context"])
@pytest.mark.parametrize("first", ["handler", "userfaultfd"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_neither_exception_is_lost(driver: Driver, first: str, context: bool) -> None:
    run_child(body_and_handler, driver, first, context)
