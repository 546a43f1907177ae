"""Every parameter of the public API that is a bool: what is neither True nor False is refused."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from enum import Enum
from typing import Any

import numpy
import pytest

import pyuffd
from pyuffd import (
    DirtyTracker,
    Feature,
    Handler,
    Process,
    Region,
    RegisterMode,
    Snapshot,
    Userfaultfd,
    ZeroSource,
)
from tests._memory import PAGE

BAD: dict[str, Any] = {
    "no": "no",
    "empty": "",
    "bytes": b"",
    "two": 2,
    "float": 1.0,
    "list": [],
    "class": bool,
    "None": None,
}


class World:
    """The objects to call."""

    def __init__(self, stack: ExitStack, folder: str) -> None:
        self.folder = folder
        self.region = stack.enter_context(Region.anonymous(4 * PAGE))
        self.uffd = stack.enter_context(Userfaultfd())
        self.handler = stack.enter_context(
            Handler(stack.enter_context(Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP)))
        )
        self.served = stack.enter_context(Region.anonymous(4 * PAGE))
        mode = RegisterMode.MISSING | RegisterMode.WP
        self.handler.serve(self.served, ZeroSource(), mode=mode)
        self.lazy = stack.enter_context(pyuffd.lazy(bytes(PAGE)))
        child = subprocess.Popen(["sleep", "60"])
        stack.callback(child.wait)
        stack.callback(child.kill)
        self.process = stack.enter_context(Process(child.pid))
        Snapshot.take(self.process, f"{folder}/taken", method="stopped")
        self.snapshot = stack.enter_context(Snapshot.open(f"{folder}/taken"))
        ours, theirs = socket.socketpair()
        self.sock = stack.enter_context(ours)
        stack.enter_context(theirs)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, str(tmp_path_factory.mktemp("bools")))


Call = Callable[..., Any]
# Each function that has such parameters; it is called with one of them wrong.
CALLS: dict[str, Call] = {
    "DirtyTracker": lambda w, **bad: DirtyTracker(w.process, **bad),
    "Handler": lambda w, **bad: Handler(w.uffd, **bad),
    "Handler.evict": lambda w, **bad: w.handler.evict(w.served, write_back=print, **bad),
    "Handler.fill": lambda w, **bad: w.handler.fill(w.served, 0, bytes(PAGE), **bad),
    "Handler.preserve": lambda w, **bad: w.handler.preserve(w.served, **bad),
    "Handler.stop": lambda w, **bad: w.handler.stop(**bad),
    "Process.attach": lambda w, **bad: w.process.attach(**bad),
    "Process.mappings": lambda w, **bad: w.process.mappings(**bad),
    "Region.advise_thp": lambda w, **bad: w.region.advise_thp(**bad),
    "Region.anonymous": lambda _, **bad: Region.anonymous(PAGE, **bad),
    "Region.file": lambda _, **bad: Region.file(__file__, PAGE, **{"writable": False, **bad}),
    "Region.hugetlbfs": lambda w, **bad: Region.hugetlbfs(f"{w.folder}/huge", PAGE, **bad),
    "Region.memfd": lambda _, **bad: Region.memfd(PAGE, **bad),
    "Region.shm": lambda _, **bad: Region.shm("pyuffd-bool", PAGE, **bad),
    "Region.touch": lambda w, **bad: w.region.touch(**bad),
    "Snapshot.flatten": lambda w, **bad: w.snapshot.flatten(f"{w.folder}/flat", **bad),
    "Snapshot.restore": lambda w, **bad: w.snapshot.restore([], **bad),
    "Snapshot.take": lambda w, **bad: Snapshot.take(w.process, f"{w.folder}/second", **bad),
    "Snapshot.write_core": lambda w, **bad: w.snapshot.write_core(f"{w.folder}/core", **bad),
    "Userfaultfd": lambda _, **bad: Userfaultfd(**bad),
    "lazy": lambda _, **bad: pyuffd.lazy(bytes(PAGE), **{"kind": "memfd", **bad}),
    "send_uffd": lambda w, **bad: pyuffd.send_uffd(w.sock, w.uffd, [w.region], **bad),
    "send_uffd_async": lambda w, **bad: driven(
        pyuffd.send_uffd_async(w.sock, w.uffd, [w.region], **bad)
    ),
    "write_core": lambda w, **bad: pyuffd.write_core(w.process, f"{w.folder}/core", **bad),
}
# What it returns is made by this library alone; a method that it inherits is called above.
RESULTS = ("DirtyRound", "RegisterSet")
INHERITED = ("LazyRegion.",)


def driven(coroutine: Any) -> None:
    try:
        coroutine.send(None)
    finally:
        coroutine.close()


def bools_of(function: Callable[..., Any]) -> list[str]:
    """Return the parameters that are bools, also those that may be None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of an exception, which has none
        return []
    return [one.name for one in parameters if one.annotation in ("bool", "bool | None")]


def parameters() -> Iterator[tuple[str, str, bool]]:
    """Yield each function of the public API with each such parameter; whether None is allowed."""
    for name in pyuffd.__all__:
        public = getattr(pyuffd, name)
        if not callable(public) or name in RESULTS:
            continue
        found = [(name, public)]
        if isinstance(public, type):
            if issubclass(public, (Enum, BaseException)):
                continue
            members = [member for member in dir(public) if not member.startswith("_")]
            found = [(name, public.__init__)]
            found += [(f"{name}.{member}", getattr(public, member)) for member in members]
        for where, function in found:
            if not callable(function) or where.startswith(INHERITED):
                continue
            for parameter in bools_of(function):
                annotation = inspect.signature(function).parameters[parameter].annotation
                yield where, parameter, "None" in annotation


PARAMETERS = sorted(set(parameters()))


def test_the_table_is_complete() -> None:
    assert {where for where, _, _ in PARAMETERS} == set(CALLS)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("where", "parameter", "optional"), PARAMETERS, ids=[f"{w}.{p}" for w, p, _ in PARAMETERS]
)
def test_is_refused(world: World, where: str, parameter: str, optional: bool, bad: str) -> None:
    if optional and bad == "None":
        return
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir(world.folder))
    with pytest.raises(TypeError, match=rf"^{parameter} must be True or False, not "):
        CALLS[where](world, **{parameter: BAD[bad]})
    assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir(world.folder))) == before
    assert not os.path.exists("/dev/shm/pyuffd-bool")
    assert "running, 1 range" in repr(world.handler)


@pytest.mark.parametrize("no", [False, 0])
def test_numbers_of_the_same_meaning(world: World, no: Any) -> None:
    world.region.touch(write=no)
    with Region.memfd(PAGE, shared=no, seal=1) as private:  # type: ignore[arg-type]
        assert not private.shared


def test_bools_of_numpy(world: World) -> None:
    world.region.touch(write=numpy.bool_(1))  # type: ignore[arg-type]
