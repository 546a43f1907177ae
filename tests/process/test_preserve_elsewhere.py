"""Handler(preserve=...) of another process's memory, and of memory that forks have."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyuffd import (
    Feature,
    Handler,
    HandlerError,
    PageState,
    ProcessGoneError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers._checks import Driver
from pyuffd.testing import FaultingChild, needs, needs_privilege
from pyuffd.testing._memory_types import MemoryName
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._serving import content, in_fork, wait_until
from tests.process._peer import Link, peer
from tests.process.test_forks import agent

PAGE = 4096
WP = RegisterMode.WP
PFWP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
FORK = Feature.EVENT_FORK
MOVING = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
NOBODY = 65534
PAGES = 6
DRIVERS: tuple[Driver, ...] = ("native", "thread")

pytestmark = needs(PFWP)


@contextlib.contextmanager
def protected(
    child: FaultingChild, driver: Driver, local: Region | None = None, **options: Any
) -> Iterator[tuple[Handler, bytearray]]:
    """A handler that saves what the child writes; the instant is the start of this block."""
    kept = bytearray(b"?" * child.region.length)
    with Handler(child.uffd, driver=driver, **options) as handler:
        handler.serve(child.region, None, mode=WP, preserve=kept, local=local)
        handler.writeprotect(child.region)
        yield handler, kept


def image(driver: Driver, name: MemoryName, by_local: bool) -> None:
    """The old content of all pages, written or not; missing ones are zeros."""
    size = 2 << 20 if name.startswith("hugetlb") else PAGE
    before = content(3 * size)
    with FaultingChild(PAGES, memory=name, mode=None, features=PFWP, content=before) as child:
        with contextlib.ExitStack() as stack:
            local = None
            if by_local:
                assert child.region.fd is not None
                local = stack.enter_context(Region.file(child.region.fd, writable=False))
            handler, kept = stack.enter_context(protected(child, driver, local))
            for page in (1, 4):
                child.run("write", page * size, b"new")
            assert handler.stats().preserved_pages == 2
            assert handler.preserve(child.region) == (PAGES - 2) * size
            assert kept == before.ljust(PAGES * size, b"\0")
            child.run("write", 0, b"free")
            # Again, for another instant.
            handler.writeprotect(child.region)
            child.run("write", 0, b"FREE")
            child.run("write", 2 * size, b"late")
        # stop() has saved the rest.
        assert kept[:5] == b"free" + before[4:5]
        assert kept[size : size + 4] == b"new" + before[size + 3 : size + 4]
        assert kept[2 * size : 3 * size] == before[2 * size :]
        assert child.run("read", 2 * size, 4) == b"late"


@pytest.mark.crossing
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", memory_params())
def test_image_by_owner(driver: Driver, name: str) -> None:
    run_child(image, driver, name, False, budget_s=20)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_image_by_local(driver: Driver, name: str) -> None:
    run_child(image, driver, name, True, budget_s=20)


def owner_dies(driver: Driver) -> None:
    """Pages that were not saved by then are lost, with an error."""
    with FaultingChild(PAGES, mode=None, features=PFWP, content=b"x" * PAGES * PAGE) as child:
        with (
            pytest.raises(HandlerError) as caught,
            protected(child, driver) as (handler, kept),
        ):
            child.run("write", 0, b"new")
            child.kill()
            wait_until(lambda: handler.owner_exited, "the owner's exit")
            with pytest.raises(ProcessGoneError):
                handler.preserve(child.region)
        assert caught.value.start is not None
        assert kept == b"x" * PAGE + b"?" * (PAGES - 1) * PAGE


@pytest.mark.parametrize("driver", DRIVERS)
def test_owner_dies(driver: Driver) -> None:
    run_child(owner_dies, driver)


# A page that cannot be read


class Remote:
    """A range of another process."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length


def owner_of_an_unreadable_page(link: Link, policy: str) -> None:
    """Write an unreadable page, and another one."""
    features = PFWP | Feature.WP_UNPOPULATED
    with Region.anonymous(PAGES * PAGE) as region, Userfaultfd(features=features) as uffd:
        region.fill(1)
        _memory.mprotect(region.start + PAGE, PAGE, 2)  # PROT_WRITE
        link.send([region.start, region.length], [uffd.fileno()])
        link.value()
        region.write(2 * PAGE, b"new")
        link.send("one")
        region.write(PAGE, b"new")
        link.send("both")
        link.value()


def unreadable(policy: str) -> None:
    """Its writer waits, protected, until it can be saved or the handler gives up."""
    with peer(owner_of_an_unreadable_page, policy) as link:
        (start, length), (fd,) = link.receive(1)
        kept = bytearray(b"?" * length)
        there = Remote(start, length)
        with Userfaultfd.from_fd(fd, owner_pid=link.pid) as uffd:
            handler = Handler(uffd, on_error=policy)  # type: ignore[arg-type]
            handler.serve(there, None, mode=WP, preserve=kept)
            handler.writeprotect(there)
            handler.start()
            link.send("go")
            assert link.value() == "one"
            wait_until(lambda: handler.stats().failed == 1, "the page is given up")
            assert handler.page_states(there)[1:3] == bytes([PageState.CLEAN, PageState.DIRTY])
            if policy == "kill":
                handler_fails(handler, start + PAGE)
                assert link.wait() == -signal.SIGKILL
                os._exit(0)
            with pytest.raises(UffdOSError) as caught:
                handler.preserve(there)
            assert caught.value.errno == errno.EFAULT
            assert caught.value.start == start + PAGE
            # The others are saved, and the writer continues once nothing can be done for it.
            assert handler.preserve(there, 2 * PAGE) == 3 * PAGE
            assert handler.preserve(there, 0, PAGE) == 0
            handler_fails(handler, start + PAGE)
            assert link.value() == "both"
            expected = bytearray(b"\1" * length)
            expected[PAGE : 2 * PAGE] = b"?" * PAGE
            assert kept == expected
            link.send("done")


def handler_fails(handler: Handler, start: int) -> None:
    with pytest.raises(HandlerError) as caught:
        handler.stop()
    assert caught.value.start == start
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFAULT


@needs_kernel_faults()
@needs(PFWP | Feature.WP_UNPOPULATED)
@pytest.mark.parametrize("policy", ["poison", "stall", "kill"])
def test_unreadable(policy: str) -> None:
    run_child(unreadable, policy, budget_s=20)


def forbidden() -> None:
    """EPERM: the monitor drops the privilege to read the owner's memory."""
    with FaultingChild(PAGES, mode=None, features=PFWP, content=b"x" * PAGES * PAGE) as child:
        kept = bytearray(b"?" * child.region.length)
        handler = Handler(child.uffd)
        handler.serve(child.region, None, mode=WP, preserve=kept)
        handler.writeprotect(child.region)
        os.setresuid(NOBODY, NOBODY, 0)
        handler.start()
        step = child.begin("write", PAGE, b"new")
        wait_until(lambda: handler.stats().failed == 1, "the page is given up")
        with pytest.raises(PermissionError):
            handler.preserve(child.region)
        # Its writer was woken, faults again, and waits again.
        wait_until(lambda: handler.stats().failed == 2, "the page is given up again")
        assert step.running
        os.setresuid(0, 0, 0)
        assert handler.preserve(child.region) == PAGES * PAGE
        step.done()
        assert kept == b"x" * PAGES * PAGE
        handler.stop()  # the page was saved after all


@needs_privilege("CAP_SYS_PTRACE")
def test_forbidden() -> None:
    if os.geteuid():
        pytest.skip("only root can drop a privilege and regain it")
    run_child(forbidden)


# Forks


def own_forks(driver: Driver, name: str, check: str) -> None:
    with (
        (Region.anonymous if name == "anon" else Region.memfd)(PAGES * PAGE) as region,
        Userfaultfd(features=PFWP | FORK | (MOVING if check in MOVES else FORK)) as uffd,
    ):
        before = content(region.length)
        region.write(0, before)
        kept = bytearray(b"?" * region.length)
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, None, mode=WP, preserve=kept)
            handler.writeprotect(region)
            CHECKS[check](handler, region)
            shared = region.shared
            if not shared:
                assert handler.stats().preserved_pages <= PAGES
        assert kept == before


def parent_writes_first(handler: Handler, region: Region) -> None:
    """The fork's page no longer has the content of its parent's page."""
    with agent() as child:
        region.write(0, b"parent")
        assert child.write(region.start, b"child") is None
        assert child.write(region.start + PAGE, b"child") is None
        region.write(PAGE, b"parent")
        handler.preserve(region)


def child_writes_alone(handler: Handler, region: Region) -> None:
    with agent() as child:
        for page in range(3):
            assert child.write(region.start + page * PAGE, b"child") is None


def stopped_with_a_child(handler: Handler, region: Region) -> None:
    """stop() visits the fork's pages too, and must not save its private ones."""
    with agent() as child:
        region.write(0, b"parent")
        handler.preserve(region, 0, 2 * PAGE)
        region.write(PAGE, b"parent")
        assert child.write(region.start + 3 * PAGE, b"child") is None
        handler.stop()


def moved_in_the_parent(handler: Handler, region: Region) -> None:
    """The parent has moved its memory by then."""
    with agent() as child:
        to = _memory.mmap(PAGES * PAGE, 0, 0x22)
        _memory.mremap(region.start, PAGES * PAGE, PAGES * PAGE, 3, to)
        filler = _memory.mmap(PAGES * PAGE, 3, 0x22 | 0x100000, address=region.start)
        _memory.fill(filler, PAGES * PAGE, 0xEE)
        assert child.write(region.start, b"child") is None
        handler.preserve(region)
        handler.unserve(region)
        _memory.munmap(to, PAGES * PAGE)


CHECKS: dict[str, Callable[[Handler, Region], None]] = {
    check.__name__: check
    for check in (parent_writes_first, child_writes_alone, stopped_with_a_child)
}
MOVES = {moved_in_the_parent.__name__: moved_in_the_parent}
CHECKS |= MOVES


@pytest.mark.crossing
@needs(FORK)
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in MOVES])
@pytest.mark.parametrize("name", ["anon", "shmem"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_own_forks(driver: Driver, name: str, check: str) -> None:
    run_child(own_forks, driver, name, check)


def forks_elsewhere(driver: Driver, name: MemoryName) -> None:
    """Forks of another process; its mapping tells whether they share the memory."""
    before = content(PAGES * PAGE)
    features = PFWP | FORK
    with (
        FaultingChild(PAGES, memory=name, mode=None, features=features, content=before) as child,
        protected(child, driver) as (handler, kept),
    ):
        assert child.run("fork", "write", PAGE, b"fork").returncode == 0
        child.run("write", PAGE, b"own")
        assert child.run("fork", "write", 2 * PAGE, b"fork").returncode == 0
        handler.preserve(child.region)
        assert kept == before
        assert handler.stats().preserved_pages == PAGES


@needs(FORK | MOVING)
@pytest.mark.parametrize("driver", DRIVERS)
def test_moved_in_the_parent(driver: Driver) -> None:
    run_child(own_forks, driver, "shmem", moved_in_the_parent.__name__)


@needs(FORK)
@pytest.mark.parametrize("name", ["anon", "shmem", "shmem-private"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_forks_elsewhere(driver: Driver, name: str) -> None:
    run_child(forks_elsewhere, driver, name)


def a_fork_is_the_owner() -> None:
    """Monitor and owner have memory at the same address: the image is the owner's."""
    import socket

    from pyuffd import recv_uffd, send_uffd

    ours, theirs = socket.socketpair()
    with ours, theirs, Region.anonymous(2 * PAGE) as region:
        region.fill(ord("P"))

        def child() -> None:
            region.fill(ord("C"))
            with Userfaultfd(features=PFWP) as uffd:
                send_uffd(theirs, uffd, [region])
                assert theirs.recv(1)
                region.write(0, b"new")
                theirs.send(b"!")
                theirs.recv(1)

        import threading

        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(in_fork(child)))
        thread.start()
        kept = bytearray(2 * PAGE)
        with recv_uffd(ours) as received, Handler(received.uffd) as handler:
            handler.serve(received.regions[0], None, mode=WP, preserve=kept)
            handler.writeprotect(received.regions[0])
            ours.send(b"!")
            assert ours.recv(1)
            handler.preserve(received.regions[0])
            assert kept == b"C" * 2 * PAGE
            assert region.read() == b"P" * 2 * PAGE
        ours.send(b"!")
        thread.join()
        assert status == [0]


def test_a_fork_is_the_owner() -> None:
    run_child(a_fork_is_the_owner)
