"""Handlers, snapshots and trackers of a program that lowered its limits meanwhile."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import pytest

from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    DirtyTracker,
    Feature,
    Handler,
    HelperLostError,
    PagePoisonedError,
    Process,
    Region,
    RegisterMode,
    Snapshot,
    UffdError,
    Userfaultfd,
    _machine,
    write_core,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.process.test_killed_keeper import filled, kill_keeper
from tests.process.test_start_limits import without_privilege_for_limits

Driver = Literal["native", "thread", "async", "inline", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "thread", "async", "inline", "process")
Ending = Literal["stop", "handler", "uffd", "region"]
ENDINGS: tuple[Ending, ...] = ("stop", "handler", "uffd", "region")
PAGES = 8

pytestmark = needs(Feature.POISON | Feature.SIGBUS)


async def read(_offset: int, length: int) -> bytes:
    return b"x" * length


def source(driver: Driver) -> Any:
    if driver == "process":
        return CallableSource(filled)
    if driver == "thread":
        return CallableSource(lambda _, size: b"x" * size)
    return AsyncSource(read) if driver == "async" else BufferSource(b"x" * PAGES * PAGE)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def made(driver: Driver) -> tuple[Userfaultfd, Region, Handler]:
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(PAGES * PAGE)
    handler = Handler(uffd, driver="thread" if driver == "async" else driver)
    handler.serve(region, source(driver), mode=RegisterMode.MISSING)
    handler.start()
    return uffd, region, handler


def ends(driver: Driver, ending: Ending) -> None:
    uffd, region, handler = made(driver)
    assert region.read(0, PAGE) == b"x" * PAGE
    with no_descriptors():
        assert region.read(PAGE, PAGE) == b"x" * PAGE
        assert handler.stats().filled_pages >= 2
        handler.populate(region, 2 * PAGE, PAGE)
        if ending == "stop":
            handler.stop()
            assert region.read(0, 3 * PAGE) == b"x" * 3 * PAGE
            with pytest.raises(PagePoisonedError):
                region.read(4 * PAGE, 1)
        if ending == "handler":
            with handler:
                pass
        for close in {"uffd": (uffd.close,), "region": (region.close,)}.get(ending, ()):
            close()
        for again in (handler.stop, uffd.close, region.close):
            again()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_end(driver: Driver, ending: Ending) -> None:
    """The link to a helper was lost: poll(2) refuses more descriptors than RLIMIT_NOFILE."""
    ended = run_child(ends, driver, ending, budget_s=30)
    assert not ended.stderr


def lost() -> None:
    uffd, region, handler = made("process")
    assert region.read(0, PAGE) == b"x" * PAGE
    kill_keeper(handler)
    with no_descriptors():
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)
        with pytest.raises(HelperLostError):
            handler.populate(region)
        with pytest.raises(HelperLostError):
            handler.stop()
        assert region.read(0, PAGE) == b"x" * PAGE
        with pytest.raises(PagePoisonedError):
            region.read(4 * PAGE, 1)
        uffd.close()
        region.close()


def test_a_lost_helper() -> None:
    """What takes over has its descriptors already."""
    run_child(lost, budget_s=30)


# The other limits, lowered after the start

LIMITS = ("NPROC", "FSIZE", "MEMLOCK", "AS", "DATA")
MANY = 64  # pages


class Uses:
    """What a program does with a limit that is reached: each works, or names the limit."""

    def __init__(self, driver: Driver, limit: str, stack: contextlib.ExitStack) -> None:
        self.stack, self.limit = stack, limit
        self.folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.chmod(self.folder, 0o777)
        if limit == "NPROC":
            without_privilege_for_limits()
        child = subprocess.Popen(["sleep", "60"])
        stack.callback(child.wait)
        stack.callback(child.kill)
        self.process = stack.enter_context(Process(child.pid))
        features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
        features |= Feature.SIGBUS if driver == "inline" else Feature.EVENT_FORK
        self.uffd = Userfaultfd(features=features)
        self.region = Region.anonymous(MANY * PAGE)
        self.handler = Handler(self.uffd, driver="thread" if driver == "async" else driver)
        mode = RegisterMode.MISSING | RegisterMode.WP
        self.handler.serve(self.region, source_of_many(driver), mode=mode)
        self.handler.start()
        assert self.region.read(0, 1) == b"x"
        self.evicts = driver != "process"
        self.forks = driver != "inline"
        self.number = getattr(resource, f"RLIMIT_{limit}")
        fields = {"AS": "VmSize", "DATA": "VmData"}
        self.value = _machine.status()[fields[limit]] if limit in fields else 0
        self.said: dict[str, str] = {}

    def all(self) -> dict[str, str]:
        """Do everything once; return what each call said, "" if it worked."""
        region, handler, process, folder = self.region, self.handler, self.process, self.folder
        Snapshot.take(process, f"{folder}/good", method="stopped", durable=False)
        snapshot = self.stack.enter_context(Snapshot.open(f"{folder}/good"))
        part = next(one for one in snapshot.regions if one.path == "[stack]")
        memory = self.stack.enter_context(Region.anonymous(part.length))
        file = os.open(f"{folder}/evicted", os.O_RDWR | os.O_CREAT, 0o600)
        self.stack.callback(os.close, file)
        os.ftruncate(file, MANY * PAGE)
        self.use("fault", lambda: region.read(PAGE, 1))
        self.use("populate", lambda: handler.populate(region, 0, 16 * PAGE))
        if self.forks:
            self.use("fork", lambda: self.fork(20))
        self.use("fill", lambda: handler.fill(region, 30 * PAGE, b"y" * PAGE))
        self.use("writeprotect", lambda: handler.writeprotect(region, 0, 8 * PAGE))
        if self.evicts:
            self.use("evict", lambda: handler.evict(region, 0, 4 * PAGE, write_back=file))
        for method in ("stopped", "cow", "precopy"):
            name = f"take {method}"
            self.use(name, partial(take, process, f"{folder}/{name}", method))
        self.use("own", lambda: Snapshot.take(memory, f"{folder}/own", max_stall_s=5))
        self.use("core", lambda: write_core(process, f"{folder}/core", max_stall_s=5))
        self.use("track", lambda: DirtyTracker(process).close())
        self.use("drops", lambda: DirtyTracker(process, watch_drops=True).close())
        self.use("stopped", lambda: process.stopped().close())
        self.use("flatten", lambda: snapshot.flatten(f"{folder}/flat", durable=False))
        self.use("restore", lambda: snapshot.restore([(part, memory)]).close())
        self.use("unserve", lambda: handler.unserve(region[: 8 * PAGE]))
        self.use("stop", handler.stop)
        self.use("close", self.uffd.close)
        self.use("unmap", region.close)
        return self.said

    def use(self, name: str, call: Callable[[], object]) -> None:
        limits = resource.getrlimit(self.number)
        resource.setrlimit(self.number, (self.value, limits[1]))
        try:
            call()
            problem = ""
        except (UffdError, OSError, RuntimeError, MemoryError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(self.number, limits)
        self.said[name] = problem

    def fork(self, page: int) -> None:
        pid = os.fork()
        if not pid:
            os._exit(self.region.read(page * PAGE, 1) != b"x")
        assert os.waitpid(pid, 0)[1] == 0


def take(process: Process, path: str, method: Any) -> None:
    Snapshot.take(process, path, method=method, durable=False, max_stall_s=5)


def source_of_many(driver: Driver) -> Any:
    return BufferSource(b"x" * MANY * PAGE) if driver in ("native", "inline") else source(driver)


def uses(driver: Driver, limit: str) -> dict[str, str]:
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        return Uses(driver, limit, stack).all()


# What os.fork() says is Python's own; a source of the program's may lack memory for its answer.
SAYS_NOTHING = {("NPROC", "fork"), ("AS", "fork"), ("DATA", "fork")}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
@pytest.mark.crossing(every=3)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_limit_lowered_after_the_start(driver: Driver, limit: str) -> None:
    """stop() waited forever for a thread that had died of RLIMIT_DATA; others named no limit."""
    said = run_child(uses, driver, limit, budget_s=90).value
    nameless = {
        name: problem
        for name, problem in said.items()
        if problem and f"RLIMIT_{limit}" not in problem and (limit, name) not in SAYS_NOTHING
    }
    assert not nameless
    assert not said["stop"]
    assert not said["close"]
    assert not said["unmap"]
