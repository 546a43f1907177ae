"""Every public call and parameter with wrong values: an error that names the parameter."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    Latency,
    PageBit,
    Pagemap,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)

PAGE = 4096
HUGE_NUMBER = 10**400
NO_NUMBER: dict[str, Any] = {
    "None": None,
    "str": "4096",
    "bytes": b"abc",
    "float": 1.5,
    "nan": math.nan,
    "list": [1],
    "class": int,
}
BAD_INT = {**NO_NUMBER, "negative": -1, "huge": HUGE_NUMBER}
BAD_SECONDS: dict[str, Any] = {
    "str": "2",
    "bytes": b"2",
    "nan": math.nan,
    "negative": -1,
    "list": [1],
    "class": float,
}
BAD_LIMIT = {**BAD_SECONDS, "inf": math.inf, "huge": HUGE_NUMBER}
BAD_FLAGS = {**NO_NUMBER, "name": "WP", "negative": -1, "huge": HUGE_NUMBER}
BAD_RANGE = {**NO_NUMBER, "object": object(), "range": range(3), "slice": slice(1)}
BAD_PATH = {"None": None, "float": 1.5, "bytes": b"abc", "list": ["a"], "NUL": "a\0b"}
BAD_FILE = {**BAD_PATH, "negative": -1, "huge": HUGE_NUMBER, "object": object()}
BAD_BUFFER = {"None": None, "str": "abc", "int": 5, "object": object()}
BAD_OBJECT = {"None": None, "str": "x", "int": 5, "object": object()}
BAD_WORD = {"None": None, "str": "x", "float": 1.5, "bytes": b"native"}
BAD_FUNCTION = {"None": None, "str": "x", "int": 5}


def optional(table: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are wrong for a parameter that may be None."""
    return {name: value for name, value in table.items() if name != "None"}


class World:
    """The objects to call, closed together with their parts."""

    def __init__(self, stack: ExitStack) -> None:
        self.uffd = stack.enter_context(Userfaultfd())
        self.region = stack.enter_context(Region.anonymous(4 * PAGE))
        self.other = stack.enter_context(Region.anonymous(4 * PAGE))
        self.served = stack.enter_context(Region.anonymous(4 * PAGE))
        self.handler = stack.enter_context(
            Handler(stack.enter_context(Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP)))
        )
        mode = RegisterMode.MISSING | RegisterMode.WP
        self.handler.serve(self.served, ZeroSource(), mode=mode)
        self.pagemap = stack.enter_context(Pagemap())
        self.entries = self.pagemap.read(self.region)
        self.residency = self.region.residency()
        ours, theirs = socket.socketpair()
        self.sock = stack.enter_context(ours)
        stack.enter_context(theirs)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


Call = Callable[[World, Any], object]
R = "range_or_start"

# The call, the parameter, wrong values for it, and a function that passes such a value.
ROWS: list[tuple[str, str, dict[str, Any], Call]] = [
    ("Userfaultfd", "features", BAD_FLAGS, lambda _, v: Userfaultfd(features=v)),
    ("from_fd", "fd", BAD_INT, lambda _, v: Userfaultfd.from_fd(v)),
    (
        "from_fd",
        "owner_pid",
        optional(BAD_INT),
        lambda w, v: Userfaultfd.from_fd(w.uffd.fileno(), owner_pid=v),
    ),
    ("register", R, BAD_RANGE, lambda w, v: w.uffd.register(v)),
    ("register", "length", BAD_INT, lambda w, v: w.uffd.register(w.region.start, v)),
    ("register", "mode", BAD_FLAGS, lambda w, v: w.uffd.register(w.region, mode=v)),
    ("unregister", R, BAD_RANGE, lambda w, v: w.uffd.unregister(v)),
    ("wake", R, BAD_RANGE, lambda w, v: w.uffd.wake(v)),
    ("copy", "dst", BAD_INT, lambda w, v: w.uffd.copy(v, bytes(PAGE))),
    ("copy", "src", BAD_BUFFER | {"int": -1}, lambda w, v: w.uffd.copy(w.region.start, v, PAGE)),
    ("copy", "length", optional(BAD_INT), lambda w, v: w.uffd.copy(w.region.start, bytes(PAGE), v)),
    (
        "copy",
        "mode",
        BAD_FLAGS,
        lambda w, v: w.uffd.copy(w.region.start, bytes(PAGE), mode=v),
    ),
    ("zeropage", R, BAD_RANGE, lambda w, v: w.uffd.zeropage(v)),
    ("zeropage", "mode", BAD_FLAGS, lambda w, v: w.uffd.zeropage(w.region, mode=v)),
    ("move", "dst", BAD_INT, lambda w, v: w.uffd.move(v, w.other.start, PAGE)),
    ("move", "src", BAD_INT, lambda w, v: w.uffd.move(w.region.start, v, PAGE)),
    ("move", "length", BAD_INT, lambda w, v: w.uffd.move(w.region.start, w.other.start, v)),
    (
        "move",
        "mode",
        BAD_FLAGS,
        lambda w, v: w.uffd.move(w.region.start, w.other.start, PAGE, mode=v),
    ),
    ("continue_", R, BAD_RANGE, lambda w, v: w.uffd.continue_(v)),
    ("continue_", "mode", BAD_FLAGS, lambda w, v: w.uffd.continue_(w.region, mode=v)),
    ("poison", R, BAD_RANGE, lambda w, v: w.uffd.poison(v)),
    ("poison", "mode", BAD_FLAGS, lambda w, v: w.uffd.poison(w.region, mode=v)),
    ("writeprotect", R, BAD_RANGE, lambda w, v: w.uffd.writeprotect(v)),
    ("writeprotect", "mode", BAD_FLAGS, lambda w, v: w.uffd.writeprotect(w.region, mode=v)),
    ("rwprotect", R, BAD_RANGE, lambda w, v: w.uffd.rwprotect(v)),
    ("rwprotect", "mode", BAD_FLAGS, lambda w, v: w.uffd.rwprotect(w.region, mode=v)),
    ("set_mode", "enable", BAD_FLAGS, lambda w, v: w.uffd.set_mode(enable=v)),
    ("set_mode", "disable", BAD_FLAGS, lambda w, v: w.uffd.set_mode(disable=v)),
    ("fill_copy", "dst", BAD_RANGE, lambda w, v: w.uffd.fill_copy(v, bytes(PAGE))),
    ("fill_copy", "src", BAD_BUFFER | {"int": -1}, lambda w, v: w.uffd.fill_copy(w.region, v)),
    (
        "fill_copy",
        "length",
        optional(BAD_INT),
        lambda w, v: w.uffd.fill_copy(w.region, bytes(PAGE), v),
    ),
    ("fill_copy", "mode", BAD_FLAGS, lambda w, v: w.uffd.fill_copy(w.region, b"", mode=v)),
    (
        "fill_copy",
        "retry_s",
        BAD_SECONDS | {"None": None},
        lambda w, v: w.uffd.fill_copy(w.region, bytes(4 * PAGE), retry_s=v),
    ),
    ("fill_zero", R, BAD_RANGE, lambda w, v: w.uffd.fill_zero(v)),
    ("fill_zero", "retry_s", BAD_SECONDS, lambda w, v: w.uffd.fill_zero(w.region, retry_s=v)),
    ("fill_continue", R, BAD_RANGE, lambda w, v: w.uffd.fill_continue(v)),
    ("fill_continue", "mode", BAD_FLAGS, lambda w, v: w.uffd.fill_continue(w.region, mode=v)),
    ("fill_poison", R, BAD_RANGE, lambda w, v: w.uffd.fill_poison(v)),
    ("fill_poison", "mode", BAD_FLAGS, lambda w, v: w.uffd.fill_poison(w.region, mode=v)),
    ("fill_move", "dst", BAD_RANGE, lambda w, v: w.uffd.fill_move(v, w.other.start)),
    ("fill_move", "src", BAD_INT, lambda w, v: w.uffd.fill_move(w.region, v)),
    (
        "fill_move",
        "mode",
        BAD_FLAGS,
        lambda w, v: w.uffd.fill_move(w.region, w.other.start, mode=v),
    ),
    (
        "read_events",
        "max_events",
        {k: v for k, v in BAD_INT.items() if k != "huge"} | {"none": 0},
        lambda w, v: w.uffd.read_events(v),
    ),
    ("Region", "Region.anonymous", NO_NUMBER | {"int": PAGE}, lambda _, v: Region(v)),
    ("anonymous", "length", BAD_INT, lambda _, v: Region.anonymous(v)),
    (
        "anonymous",
        "huge_page_size",
        optional(BAD_INT),
        lambda _, v: Region.anonymous(PAGE, huge_page_size=v),
    ),
    ("memfd", "length", BAD_INT, lambda _, v: Region.memfd(v)),
    (
        "memfd",
        "huge_page_size",
        optional(BAD_INT),
        lambda _, v: Region.memfd(PAGE, huge_page_size=v),
    ),
    ("shm", "name", BAD_PATH, lambda _, v: Region.shm(v, PAGE)),
    ("shm", "length", BAD_INT, lambda _, v: Region.shm("pyuffd-bad-arguments", v)),
    ("hugetlbfs", "path", BAD_PATH, lambda _, v: Region.hugetlbfs(v, PAGE)),
    ("hugetlbfs", "length", BAD_INT, lambda _, v: Region.hugetlbfs("pyuffd-bad-arguments", v)),
    ("file", "file", BAD_FILE, lambda _, v: Region.file(v)),
    ("file", "length", optional(BAD_INT), lambda _, v: Region.file(__file__, v, writable=False)),
    ("file", "offset", BAD_INT, lambda _, v: Region.file(__file__, offset=v, writable=False)),
    ("at", "address", BAD_INT, lambda _, v: Region.at(v, PAGE)),
    ("at", "length", BAD_INT, lambda w, v: Region.at(w.region.start, v)),
    (
        "at",
        "page_size",
        {k: v for k, v in optional(BAD_INT).items() if k != "huge"},
        lambda w, v: Region.at(w.region.start, PAGE, v),
    ),
    ("read", "offset", BAD_INT, lambda w, v: w.region.read(v)),
    ("read", "length", optional(BAD_INT), lambda w, v: w.region.read(0, v)),
    ("write", "offset", BAD_INT, lambda w, v: w.region.write(v, b"abc")),
    ("write", "offset", {"swapped": b"abc"}, lambda w, v: w.region.write(v, 0)),  # type: ignore[arg-type]
    ("write", "data", BAD_BUFFER, lambda w, v: w.region.write(0, v)),
    ("fill", "value", BAD_INT, lambda w, v: w.region.fill(v)),
    ("fill", "offset", BAD_INT, lambda w, v: w.region.fill(0, v)),
    ("touch", "offset", BAD_INT, lambda w, v: w.region.touch(v)),
    ("touch", "length", optional(BAD_INT), lambda w, v: w.region.touch(0, v)),
    (
        "digest",
        "name",
        {**BAD_WORD, "no length": "shake_128", "list": [1]},
        lambda w, v: w.region.digest(v),
    ),
    ("digest", "offset", BAD_INT, lambda w, v: w.region.digest("sha256", v)),
    ("madvise", "advice", BAD_INT, lambda w, v: w.region.madvise(v)),
    ("madvise", "offset", BAD_INT, lambda w, v: w.region.madvise(4, v)),
    ("advise_thp", "offset", BAD_INT, lambda w, v: w.region.advise_thp(True, v)),
    ("pageout", "offset", BAD_INT, lambda w, v: w.region.pageout(v)),
    ("punch_hole", "offset", BAD_INT, lambda w, v: w.region.punch_hole(v)),
    ("Region.residency", "offset", BAD_INT, lambda w, v: w.region.residency(v)),
    ("Pagemap", "pid", optional(BAD_INT), lambda _, v: Pagemap(v)),
    ("Pagemap.read", R, BAD_RANGE, lambda w, v: w.pagemap.read(v)),
    ("Pagemap.read", "length", BAD_INT, lambda w, v: w.pagemap.read(w.region.start, v)),
    ("scan", R, BAD_RANGE, lambda w, v: w.pagemap.scan(v)),
    ("scan", "max_pages", BAD_INT, lambda w, v: w.pagemap.scan(w.region, max_pages=v)),
    ("scan", "vec_len", optional(BAD_INT), lambda w, v: w.pagemap.scan(w.region, vec_len=v)),
    ("scan", "flags", BAD_FLAGS, lambda w, v: w.pagemap.scan(w.region, flags=v)),
    *(
        (
            "scan",
            name,
            optional(BAD_FLAGS) if name == "return_mask" else BAD_FLAGS,
            lambda w, v, name=name: w.pagemap.scan(w.region, **{name: v}),
        )
        for name in ("category_mask", "category_anyof_mask", "category_inverted", "return_mask")
    ),
    ("PageEntries.at", "address", NO_NUMBER, lambda w, v: w.entries.at(v)),
    ("PageEntries.count", "bits", BAD_FLAGS, lambda w, v: w.entries.count(v)),
    (
        "PageEntries.count",
        "clear",
        BAD_FLAGS,
        lambda w, v: w.entries.count(PageBit.PRESENT, clear=v),
    ),
    ("PageEntries.where", "bits", BAD_FLAGS, lambda w, v: w.entries.where(v)),
    (
        "PageRanges.pages",
        "page_size",
        BAD_INT | {"none": 0},
        lambda w, v: w.entries.where(PageBit.PRESENT).pages(v),
    ),
    ("residency", R, BAD_RANGE, lambda _, v: pyuffd.residency(v)),
    (
        "residency",
        "page_size",
        optional(BAD_INT),
        lambda w, v: pyuffd.residency(w.region, page_size=v),
    ),
    ("residency", "fd", optional(BAD_INT), lambda w, v: pyuffd.residency(w.region, fd=v)),
    ("Residency.count", "state", BAD_INT, lambda w, v: w.residency.count(v)),
    ("Residency.where", "state", BAD_INT, lambda w, v: w.residency.where(v)),
    ("percentile", "percent", BAD_LIMIT | {"None": None}, lambda _, v: Latency(()).percentile(v)),
    ("BufferSource", "data", BAD_BUFFER, lambda _, v: BufferSource(v)),
    ("FileSource", "file", BAD_FILE, lambda _, v: FileSource(v)),
    ("FileSource", "offset", BAD_INT, lambda _, v: FileSource(__file__, v)),
    ("CallableSource", "function", BAD_FUNCTION, lambda _, v: CallableSource(v)),
    ("CallableSource", "length", optional(BAD_INT), lambda _, v: CallableSource(zeros, v)),
    ("AsyncSource", "function", BAD_FUNCTION, lambda _, v: AsyncSource(v)),
    ("AsyncSource", "loop", optional(BAD_OBJECT), lambda _, v: AsyncSource(answer, loop=v)),
    ("AsyncSource", "length", optional(BAD_INT), lambda _, v: AsyncSource(answer, length=v)),
    ("Handler", "uffd", BAD_OBJECT | {"class": Userfaultfd}, lambda _, v: Handler(v)),
    ("Handler", "driver", BAD_WORD, lambda w, v: Handler(w.uffd, driver=v)),
    ("Handler", "on_error", BAD_WORD, lambda w, v: Handler(w.uffd, on_error=v)),
    (
        "Handler",
        "stall_timeout_s",
        BAD_SECONDS | {"none": 0},
        lambda w, v: Handler(w.uffd, stall_timeout_s=v),
    ),
    ("Handler", "prefetch", BAD_INT, lambda w, v: Handler(w.uffd, prefetch=v)),
    ("Handler", "workers", BAD_INT, lambda w, v: Handler(w.uffd, workers=v)),
    ("Handler", "spin_us", BAD_LIMIT, lambda w, v: Handler(w.uffd, spin_us=v)),
    (
        "Handler",
        "cpus",
        {"int": 1, "str": "0", "of str": ["0"], "none": [], "huge": [HUGE_NUMBER]},
        lambda w, v: Handler(w.uffd, cpus=v),
    ),
    ("Handler", "owner_pid", optional(BAD_INT), lambda w, v: Handler(w.uffd, owner_pid=v)),
    ("serve", "region", BAD_RANGE, lambda w, v: w.handler.serve(v, ZeroSource())),
    (
        "serve",
        "source",
        {"None": None, "int": 5, "object": object(), "class": ZeroSource, "list": [b"x"]},
        lambda w, v: w.handler.serve(w.other, v),
    ),
    ("serve", "mode", BAD_FLAGS, lambda w, v: w.handler.serve(w.other, ZeroSource(), mode=v)),
    (
        "serve",
        "preserve",
        optional(BAD_BUFFER) | {"read-only": bytes(4 * PAGE)},
        lambda w, v: w.handler.serve(w.other, None, mode=RegisterMode.WP, preserve=v),
    ),
    (
        "serve",
        "local",
        optional(BAD_RANGE),
        lambda w, v: w.handler.serve(w.other, ZeroSource(), local=v),
    ),
    (
        "serve",
        "uffd",
        optional(BAD_OBJECT),
        lambda w, v: w.handler.serve(w.other, ZeroSource(), uffd=v),
    ),
    (
        "serve",
        "present",
        optional(BAD_WORD),
        lambda w, v: w.handler.serve(w.other, ZeroSource(), present=v),
    ),
    ("unserve", "region", BAD_RANGE, lambda w, v: w.handler.unserve(v)),
    *(
        (
            name,
            parameter,
            values,
            lambda w, v, name=name, parameter=parameter: getattr(w.handler, name)(
                **{"region": w.served, parameter: v}
            ),
        )
        for name in (
            *("page_states", "populate", "writeprotect", "preserve"),
            *("unprotect", "checkpoint", "retry"),
        )
        for parameter, values in (
            ("region", BAD_RANGE),
            ("offset", BAD_INT),
            ("length", optional(BAD_INT)),
        )
    ),
    (
        "populate",
        "chunk",
        optional(BAD_INT) | {"none": 0},
        lambda w, v: w.handler.populate(w.served, chunk=v),
    ),
    *(
        (
            "fill",
            parameter,
            values,
            lambda w, v, parameter=parameter: w.handler.fill(
                **{"region": w.served, "offset": 0, "data": bytes(PAGE), parameter: v}
            ),
        )
        for parameter, values in (
            ("region", BAD_RANGE),
            ("offset", BAD_INT),
            ("data", BAD_BUFFER | {"int": -1}),
            ("length", optional(BAD_INT)),
            ("data_offset", optional(BAD_INT)),
        )
    ),
    *(
        (
            "evict",
            parameter,
            values,
            lambda w, v, parameter=parameter: w.handler.evict(
                **{"region": w.served, "write_back": None, parameter: v}
            ),
        )
        for parameter, values in (
            ("region", BAD_RANGE),
            ("offset", BAD_INT),
            ("length", optional(BAD_INT)),
            ("write_back", optional(BAD_BUFFER) | {"int": -1, "class": dict}),
        )
    ),
    ("hold", "limit_s", BAD_SECONDS, lambda w, v: w.handler.hold(v)),
    ("stop", "timeout_s", BAD_SECONDS, lambda w, v: w.handler.stop(timeout_s=v)),
    ("send_uffd", "sock", BAD_OBJECT, lambda w, v: pyuffd.send_uffd(v, w.uffd, [])),
    ("send_uffd", "uffd", BAD_OBJECT, lambda w, v: pyuffd.send_uffd(w.sock, v, [])),
    (
        "send_uffd",
        "regions",
        {**BAD_OBJECT, "of int": [1]},
        lambda w, v: pyuffd.send_uffd(w.sock, w.uffd, v),
    ),
    (
        "send_uffd",
        "allow_uids",
        {"int": 5, "str": "0", "of str": ["0"]},
        lambda w, v: pyuffd.send_uffd(w.sock, w.uffd, [], allow_uids=v),
    ),
    (
        "send_uffd",
        "timeout_s",
        BAD_SECONDS,
        lambda w, v: pyuffd.send_uffd(w.sock, w.uffd, [], timeout_s=v),
    ),
    ("recv_uffd", "sock", BAD_OBJECT, lambda _, v: pyuffd.recv_uffd(v)),
    ("recv_uffd", "max_regions", BAD_INT, lambda w, v: pyuffd.recv_uffd(w.sock, max_regions=v)),
    ("recv_uffd", "timeout_s", BAD_SECONDS, lambda w, v: pyuffd.recv_uffd(w.sock, timeout_s=v)),
    ("listen_unix", "path", BAD_PATH | {"empty": ""}, lambda _, v: pyuffd.listen_unix(v)),
    ("listen_unix", "backlog", BAD_INT, lambda _, v: pyuffd.listen_unix("x", backlog=v)),
    ("connect_unix", "path", BAD_PATH | {"empty": ""}, lambda _, v: pyuffd.connect_unix(v)),
    ("connect_unix", "timeout_s", BAD_SECONDS, lambda _, v: pyuffd.connect_unix("x", timeout_s=v)),
]


def zeros(offset: int, length: int) -> bytes:
    return bytes(length)


async def answer(offset: int, length: int) -> bytes:
    return bytes(length)


@pytest.mark.parametrize(
    ("name", "call", "value"),
    [
        pytest.param(name, call, value, id=f"{where}.{name}.{kind}")
        for where, name, values, call in ROWS
        for kind, value in values.items()
    ],
)
def test_names_what_is_wrong(world: World, name: str, call: Call, value: Any) -> None:
    open_before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises((TypeError, ValueError)) as caught:
        call(world, value)
    assert type(caught.value) in (TypeError, ValueError)
    assert re.search(rf"\b{re.escape(name)}\b", str(caught.value)), caught.value
    assert sorted(os.listdir("/proc/self/fd")) == open_before
    assert not os.path.exists("/dev/shm/pyuffd-bad-arguments")
    assert not os.path.exists("pyuffd-bad-arguments")
    assert not world.uffd._registered
    assert world.uffd._claims.owner is None
    assert "running, 1 range" in repr(world.handler)


class NoLength:
    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def test_source_without_length(world: World) -> None:
    with pytest.raises(TypeError, match=r"NoLength has read.*no `length`"):
        world.handler.serve(world.other, NoLength())  # type: ignore[arg-type]


def test_class_in_place_of_a_source(world: World) -> None:
    with pytest.raises(TypeError, match=r"ZeroSource is a class.*give an instance, ZeroSource"):
        world.handler.serve(world.other, ZeroSource)  # type: ignore[arg-type]


def test_numbers_of_another_kind(world: World) -> None:
    """Objects with __index__ are numbers, and infinity is a time to wait."""

    class Index:
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    pages = world.pagemap.read(Index(world.region.start), Index(PAGE))  # type: ignore[arg-type]
    assert len(pages) == 1
    assert world.region.read(Index(0), Index(3)) == bytes(3)  # type: ignore[arg-type]
    assert world.uffd.read_events(HUGE_NUMBER) == []


@pytest.mark.parametrize("call", [lambda w, v: w.region.write(0, v), lambda _, v: BufferSource(v)])
def test_buffer_with_gaps(world: World, call: Call) -> None:
    with pytest.raises(BufferError, match="data is a buffer with gaps"):
        call(world, memoryview(b"abcd")[::2])
