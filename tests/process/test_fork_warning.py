"""A fork whose child would read zeros in a served region warns once; other forks do not warn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    PageBit,
    Pagemap,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd._pages import RangeLike
from pyuffd.handlers._checks import Driver
from pyuffd.testing import FaultingChild, needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.process._pitfalls import Data

PAGES = 4
MADV_DONTNEED, MADV_DONTFORK, MADV_WIPEONFORK = 4, 10, 18
PFWP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM

pytestmark = needs(Feature(0))


@contextlib.contextmanager
def caught() -> Iterator[list[str]]:
    """The RuntimeWarnings of the body."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        texts: list[str] = []
        yield texts
        texts += [str(one.message) for one in seen if issubclass(one.category, RuntimeWarning)]
        for one in seen:
            if issubclass(one.category, RuntimeWarning):
                assert one.filename.endswith(("test_fork_warning.py", "popen_fork.py"))


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def pool() -> None:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()


def spawn() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def spawn_by_fork() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True, preexec_fn=int)


def posix_spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)


FORKS: dict[str, tuple[Callable[[], None], bool]] = {
    "fork": (fork, True),
    "multiprocessing": (pool, True),
    "subprocess": (spawn, False),
    "subprocess-preexec": (spawn_by_fork, False),
    "posix_spawn": (posix_spawn, False),
}


def ways(driver: Driver, name: str) -> None:
    for how, (make_child, warns) in FORKS.items():
        with contextlib.closing(memory_of(name)) as memory:
            features = Feature.SIGBUS if driver == "inline" else Feature(0)
            with Userfaultfd(features=features) as uffd, Handler(uffd, driver=driver) as handler:
                region = memory.pages(PAGES)
                content = b"c" * region.length
                source = Data(content) if driver in ("thread", "process") else BufferSource(content)
                handler.serve(region, source)
                region.touch(0, 1)
                with caught() as texts:
                    make_child()
                    make_child()
                assert len(texts) == warns, how
                assert all(f"{region.start:#x}" in text for text in texts)


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", ["native", "inline", "thread"])
def test_ways(driver: str, name: str) -> None:
    run_child(ways, driver, name, budget_s=40)


@pytest.mark.parametrize("name", memory_params("anon", "shmem"))
def test_ways_beside_a_helper_process(name: str) -> None:
    run_child(ways, "process", name, budget_s=40)


@dataclass(frozen=True)
class Quiet:
    """Circumstances that make a fork harmless."""

    features: Feature = Feature(0)  # noqa: RUF009 - an immutable flag
    mode: RegisterMode = RegisterMode.MISSING
    zeros: bool = False
    before: Callable[[Handler, Region], object] = lambda _handler, _region: None
    warns: bool = False


def populate(handler: Handler, region: Region) -> None:
    handler.populate(region)


def drop_all(handler: Handler, region: Region) -> None:
    handler.populate(region)
    region.madvise(MADV_DONTNEED)


def stop(handler: Handler, region: Region) -> None:
    handler.stop()


def unserve(handler: Handler, region: Region) -> None:
    handler.unserve(region)


def dont_fork(handler: Handler, region: Region) -> None:
    region.madvise(MADV_DONTFORK)


def wipe_on_fork(handler: Handler, region: Region) -> None:
    region.madvise(MADV_WIPEONFORK)


def close(handler: Handler, region: Region) -> None:
    region.close()


QUIET = {
    "nothing": Quiet(warns=True),
    "events": Quiet(Feature.EVENT_FORK),
    "zeros": Quiet(zeros=True),
    "populated": Quiet(before=populate),
    "dropped": Quiet(Feature.EVENT_REMOVE, before=drop_all),
    "stopped": Quiet(before=stop),
    "unserved": Quiet(before=unserve),
    "closed": Quiet(before=close),
    "MADV_DONTFORK": Quiet(before=dont_fork),
    "MADV_WIPEONFORK": Quiet(before=wipe_on_fork),
    "write-protected": Quiet(PFWP, RegisterMode.WP),
}


def quiet(name: str) -> None:
    case = QUIET[name]
    with (
        Region.anonymous(PAGES * 4096) as region,
        Userfaultfd(features=case.features) as uffd,
        Handler(uffd) as handler,
    ):
        source = ZeroSource() if case.zeros else BufferSource(b"c" * region.length)
        handler.serve(region, None if case.mode == RegisterMode.WP else source, mode=case.mode)
        case.before(handler, region)
        with caught() as texts:
            fork()
        assert bool(texts) == case.warns


@needs(Feature.EVENT_FORK | Feature.EVENT_REMOVE | PFWP)
@pytest.mark.parametrize("name", QUIET)
def test_quiet(name: str) -> None:
    run_child(quiet, name)


# Writes to shared memory


MODES_OF_TRACKING = {
    "handler": Feature(0),
    "raw": Feature(0),
    "raw-async": Feature.WP_ASYNC,
    "events": Feature.EVENT_FORK,
    "dont-fork": Feature(0),
    "unregistered": Feature(0),
}


def tracked(name: str) -> None:
    """Writes of the child to shared memory are not seen, which is so of every kind of tracking."""
    for how, features in MODES_OF_TRACKING.items():
        with (
            contextlib.closing(memory_of(name)) as memory,
            Userfaultfd(features=PFWP | features) as uffd,
            contextlib.ExitStack() as stack,
        ):
            region = memory.pages(PAGES)
            region.write(0, b"o" * region.length)
            if how in ("handler", "events"):
                handler = stack.enter_context(Handler(uffd))
                handler.serve(region, None, mode=RegisterMode.WP, present="keep")
                handler.writeprotect(region)
            else:
                uffd.register(region, mode=RegisterMode.WP)
                uffd.writeprotect(region)
            if how == "dont-fork":
                region.madvise(MADV_DONTFORK)
            if how == "unregistered":
                uffd.unregister(region)
            loses = name in ("shmem", "hugetlb") and how in ("handler", "raw", "raw-async")
            with caught() as texts:
                pid = os.fork()
                if pid == 0:
                    if how != "dont-fork":
                        region.write(0, b"child")
                    os._exit(0)
                os.waitpid(pid, 0)
                fork()
            assert len(texts) == loses, how
            assert all("tracked" in text for text in texts)
            if loses:  # what is warned of: the kernel's page table does not tell of the write
                assert region.read(0, 5) == b"child"
                with Pagemap() as pagemap:
                    assert pagemap.read(region.start, 4096).at(region.start) & PageBit.UFFD_WP


@needs(PFWP | Feature.WP_ASYNC | Feature.EVENT_FORK)
@pytest.mark.parametrize("name", memory_params())
def test_writes_of_the_child(name: str) -> None:
    run_child(tracked, name, budget_s=30)


def not_started() -> None:
    """Without start() the child reads zeros too."""
    with Region.anonymous(4096) as region, Userfaultfd() as uffd:
        handler = Handler(uffd)
        handler.serve(region, BufferSource(b"c" * 4096))
        with caught() as texts:
            fork()
        assert texts
        handler.stop()


def test_not_started() -> None:
    run_child(not_started)


def of_others() -> None:
    """A fork does not copy another process's memory."""
    with FaultingChild(1, mode=None) as child, Handler(child.uffd) as handler:
        region: RangeLike = child.region
        handler.serve(region, BufferSource(b"c" * 4096))
        with caught() as texts:
            fork()
        assert not texts


def test_of_others() -> None:
    run_child(of_others)


def child_of_a_fork() -> None:
    """The child does not warn of its parent's handlers."""
    with (
        Region.anonymous(4096) as region,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
        caught() as texts,
    ):
        handler.serve(region, BufferSource(b"c" * 4096))
        pid = os.fork()
        if pid == 0:
            with caught() as more:
                fork()
            os._exit(len(more))
        assert os.waitpid(pid, 0)[1] == 0
    assert len(texts) == 1


def test_child_of_a_fork() -> None:
    run_child(child_of_a_fork)
