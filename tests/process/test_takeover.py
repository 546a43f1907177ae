"""A handler that takes a descriptor over gets the faults that a dead handler had read."""

from __future__ import annotations

import os
import select
import signal
from typing import Literal

import pytest

from pyuffd import BufferSource, Feature, Handler, Region, RegisterMode, ZeroSource
from pyuffd.handlers._checks import Driver
from pyuffd.testing import FaultingChild, needs
from pyuffd.testing._memory_types import MemoryName
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._faults import fork
from tests.process._pitfalls import Data

PFWP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MINORS = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
MESSAGE = 32
Dies = Literal["before-serve", "before-start"]


def read_and_die(fd: int) -> None:
    """Read a fault in another process, which is killed before it can answer."""
    pid = fork()
    if pid == 0:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL if len(os.read(fd, MESSAGE)) == MESSAGE else 15)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def takeover(driver: Driver, name: MemoryName, mode: int, dies: Dies) -> None:
    kind = RegisterMode(mode)
    size = (2 << 20) if name.startswith("hugetlb") else 4096
    features = PFWP if kind == RegisterMode.WP else Feature(0)
    if kind == RegisterMode.MINOR:
        features = MINORS
    data = b"d" * 2 * size
    with FaultingChild(
        2,
        memory=name,
        mode=kind,
        features=features,
        content=b"o" * 2 * size if kind == RegisterMode.WP else b"",
    ) as child:
        if kind == RegisterMode.WP:
            child.uffd.writeprotect(child.region.start, 2 * size)
        if kind == RegisterMode.MINOR:
            assert child.region.fd is not None
            with Region.file(child.region.fd) as alias:
                alias.write(0, data)
        order = ("write", size, b"new") if kind == RegisterMode.WP else ("read", size, 4)
        step = child.begin(*order)
        if dies == "before-serve":
            read_and_die(child.uffd.fileno())
        with Handler(child.uffd, driver=driver, autostart=False) as handler:
            source: object = None
            if kind == RegisterMode.MISSING:
                source = BufferSource(data) if driver == "native" else Data(data)
            handler.serve(child.region, source, mode=kind)  # type: ignore[arg-type]
            if dies == "before-start":
                read_and_die(child.uffd.fileno())
            assert step.running
            handler.start()
            assert step.done() == (None if kind == RegisterMode.WP else b"dddd")
            if kind == RegisterMode.WP:
                assert child.run("read", size, 4) == b"newo"


@pytest.mark.crossing
@needs(PFWP | MINORS)
@pytest.mark.parametrize("dies", ["before-serve", "before-start"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
@pytest.mark.parametrize("mode", RegisterMode.MISSING | RegisterMode.WP)
@pytest.mark.parametrize("name", memory_params())
def test_takeover(driver: str, name: str, mode: RegisterMode, dies: str) -> None:
    run_child(takeover, driver, name, int(mode), dies, budget_s=20)


@pytest.mark.crossing
@needs(PFWP | MINORS)
@pytest.mark.parametrize("dies", ["before-serve", "before-start"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_takeover_of_minor_faults(driver: str, name: str, dies: str) -> None:
    run_child(takeover, driver, name, int(RegisterMode.MINOR), dies, budget_s=20)


def several_spaces() -> None:
    """Also if the descriptor is not the handler's first."""
    with FaultingChild(1) as first, FaultingChild(1) as second:
        steps = [child.begin("read", 0, 1) for child in (first, second)]
        for child in (first, second):
            read_and_die(child.uffd.fileno())
        with Handler(first.uffd) as handler:
            for child in (first, second):
                handler.serve(child.region, ZeroSource(), uffd=child.uffd)
            assert [step.done() for step in steps] == [b"\0"] * 2


@needs(Feature(0))
def test_several_spaces() -> None:
    run_child(several_spaces)
