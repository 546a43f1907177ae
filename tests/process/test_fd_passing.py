"""A userfaultfd in another process: adoption, serving it there, the owner's death."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterator

import pytest

from pyuffd import (
    ClosedError,
    Feature,
    Fork,
    PageBit,
    Pagefault,
    PagefaultFlag,
    Pagemap,
    ProcessGoneError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    WriteprotectMode,
    lowlevel,
)
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._need import kernel_features
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task, fork, next_events, next_fault, no_events
from tests.process._peer import Link, peer

pytestmark = [needs(Feature(0)), needs_kernel_faults()]

PAGE = 4096
NOBODY = 65534
WP = RegisterMode.WP
PR_SET_DUMPABLE = 4


# The owners of the memory


def lend(link: Link, memory: str, features: int, blocking: bool = False) -> None:
    """Register four missing pages, send the userfaultfd, and read the pages when told."""
    factory = memory_of(memory)
    region = factory.pages(4)
    with Userfaultfd(features=Feature(features), nonblocking=not blocking) as uffd:
        uffd.register(region)
        tid = ctypes.CDLL(None).gettid()
        link.send([region.start, tid], [uffd.fileno()])
        if link.value() == "read":
            link.send(region.digest().hex())
            link.value()
    factory.close()


def lend_protected(link: Link, memory: str) -> None:
    """Write, register for write-protect faults, send the userfaultfd, and write again when told."""
    factory = memory_of(memory)
    region = factory.pages(2)
    region.fill(1)
    with Userfaultfd() as uffd:
        uffd.register(region, mode=WP)
        link.send(region.start, [uffd.fileno()])
        link.value()
        region.write(factory.page_size, b"\x02")
        link.send(region.read(factory.page_size, 1)[0])
        link.value()
    factory.close()


def lend_and_exit(link: Link) -> None:
    region = Region.anonymous(2 * PAGE)
    uffd = Userfaultfd()
    uffd.register(region, mode=RegisterMode.MISSING | WP)
    link.send(region.start, [uffd.fileno()])
    os._exit(0)


def lend_and_fork(link: Link) -> None:
    """Fork with EVENT_FORK on: the grandchild reads the page its parent never touched."""
    with Region.anonymous(2 * PAGE) as region, Userfaultfd(features=Feature.EVENT_FORK) as uffd:
        uffd.register(region, mode=RegisterMode.MISSING | WP)
        link.send(region.start, [uffd.fileno()])
        pid = fork()
        if not pid:
            try:
                os._exit(region.read(PAGE, 1)[0])
            finally:
                os._exit(255)
        link.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        link.value()


# Adoption


@pytest.mark.parametrize("memory", memory_params())
def test_serve_another_process(memory: str) -> None:
    features = Feature.THREAD_ID
    with peer(lend, memory, int(features)) as link:
        (start, tid), (fd,) = link.receive(1)
        with Userfaultfd.from_fd(fd) as uffd:
            assert uffd.fileno() == fd
            size = memory_of(memory).page_size
            content = b"".join(bytes([number + 1]) * size for number in range(4))
            link.send("read")
            for number in range(4):
                fault = next_fault(uffd)
                assert fault.address == start + number * size
                assert fault.flags & ~PagefaultFlag.WRITE == PagefaultFlag(0)
                assert fault.thread_id == tid
                page = content[number * size : (number + 1) * size]
                assert uffd.copy(fault.address, page) == size
            assert link.value() == hashlib.sha256(content).hexdigest()
            link.send()


@pytest.mark.parametrize(
    "features", [Feature(0), Feature.THREAD_ID, Feature.EXACT_ADDRESS | Feature.EVENT_UNMAP]
)
def test_what_was_negotiated_is_known(features: Feature) -> None:
    with peer(lend, "anon", int(features)) as link:
        _, (fd,) = link.receive(1)
        with Userfaultfd.from_fd(fd) as uffd, Userfaultfd() as other:
            assert uffd.features == features
            assert uffd.supported == other.supported
            assert uffd.ioctls == other.ioctls
        link.send("done")


def test_flags_are_ours_not_the_sender_s() -> None:
    with peer(lend, "anon", 0, True) as link:
        _, (fd,) = link.receive(1)
        os.set_inheritable(fd, True)
        assert os.get_blocking(fd)
        with Userfaultfd.from_fd(fd) as uffd:
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            # A blocking descriptor would hang here.
            assert uffd.read_events() == []
        link.send("done")


def test_a_subclass_adopts_itself() -> None:
    class Mine(Userfaultfd):
        pass

    with Mine.from_fd(Userfaultfd().detach()) as uffd:
        assert type(uffd) is Mine


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """Descriptors that a test made and that must still be open at its end."""
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.fstat(fd)
        os.close(fd)


def pipe_end() -> int:
    first, second = os.pipe()
    os.close(second)
    return first


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: os.open("/dev/null", os.O_RDONLY), id="device"),
        pytest.param(pipe_end, id="pipe"),
        pytest.param(lambda: os.memfd_create("[userfaultfd]"), id="memfd"),
        pytest.param(lambda: os.eventfd(0), id="eventfd"),
        pytest.param(lambda: lowlevel.open_syscall(os.O_CLOEXEC), id="no-handshake"),
    ],
)
def test_not_adoptable_stays_the_caller_s(make: Callable[[], int], descriptors: list[int]) -> None:
    fd = make()
    descriptors.append(fd)
    os.set_inheritable(fd, True)
    blocking = os.get_blocking(fd)
    with pytest.raises(ValueError, match=f"file descriptor {fd} ") as caught:
        Userfaultfd.from_fd(fd)
    assert not isinstance(caught.value, ClosedError)
    assert os.get_blocking(fd) == blocking
    assert os.get_inheritable(fd)


def test_handshake_may_follow_a_refused_adoption() -> None:
    fd = lowlevel.open_syscall(os.O_CLOEXEC)
    with pytest.raises(ValueError):
        Userfaultfd.from_fd(fd)
    lowlevel.api(fd, 0)
    Userfaultfd.from_fd(fd).close()


@pytest.mark.parametrize("fd", [-1, 1 << 30])
def test_no_such_descriptor(fd: int) -> None:
    with pytest.raises(ValueError, match=rf"{fd}|{fd:#x}"):
        Userfaultfd.from_fd(fd)


def adopt_as_nobody() -> list[int]:
    fd = Userfaultfd().detach()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    with Userfaultfd.from_fd(fd) as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        task = Task(region.read, 0, 1)
        uffd.copy(next_fault(uffd).address, b"\x09" * PAGE)
        return [int(uffd.supported), task.result()[0]]


@needs_privilege("CAP_SYS_ADMIN")
def test_an_unprivileged_process_adopts() -> None:
    assert run_child(adopt_as_nobody).value == [kernel_features(), 9]


# The owner's memory, from outside


@needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
@pytest.mark.parametrize("memory", memory_params())
def test_write_protect_another_process(memory: str) -> None:
    size = memory_of(memory).page_size
    with peer(lend_protected, memory) as link:
        start, (fd,) = link.receive(1)
        with Userfaultfd.from_fd(fd) as uffd, Pagemap(link.pid) as pagemap:
            uffd.writeprotect(start, 2 * size)
            assert PageBit.UFFD_WP in pagemap.read(start, 2 * size).at(start + size)
            link.send("write")
            fault = next_fault(uffd)
            assert fault.address == start + size
            assert fault.flags == PagefaultFlag.WP | PagefaultFlag.WRITE
            uffd.writeprotect(start + size, size, mode=WriteprotectMode(0))
            assert link.value() == 2
            assert no_events(uffd)
            entries = pagemap.read(start, 2 * size)
            assert PageBit.UFFD_WP in entries.at(start)
            assert PageBit.UFFD_WP not in entries.at(start + size)
            link.send("done")


@needs(Feature.EVENT_FORK)
@needs_privilege("CAP_SYS_PTRACE")
def test_fork_event_gives_the_child_s_userfaultfd() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with peer(lend_and_fork) as link:
        start, (fd,) = link.receive(1)
        with Userfaultfd.from_fd(fd) as uffd:
            (event,) = next_events(uffd)
            assert isinstance(event, Fork)
            with event.uffd as child:
                assert child.fileno() != fd
                assert child.features == uffd.features == Feature.EVENT_FORK
                assert child.supported == uffd.supported
                assert not os.get_blocking(child.fileno())
                assert not os.get_inheritable(child.fileno())
                assert next_fault(child) == Pagefault(start + PAGE, PagefaultFlag(0), 0)
                child.copy(start + PAGE, b"\x2a" * PAGE)
                assert link.value() == 42
                assert no_events(uffd)
                # The child was reaped: its memory is gone, its parent's is not.
                with pytest.raises(ProcessGoneError):
                    child.copy(start, bytes(PAGE))
            assert child.closed
            assert uffd.copy(start, bytes(PAGE)) == PAGE
            link.send("done")
    assert len(os.listdir("/proc/self/fd")) == before


# The owner's death


@pytest.fixture
def orphan() -> Iterator[tuple[Userfaultfd, int]]:
    """An adopted userfaultfd whose owner has exited, and the address of its two pages."""
    with peer(lend_and_exit) as link:
        start, (fd,) = link.receive(1)
        with Userfaultfd.from_fd(fd) as uffd:
            link.wait()
            yield uffd, start


GONE: dict[str, Callable[[Userfaultfd, int], object]] = {
    "copy": lambda uffd, at: uffd.copy(at, bytes(2 * PAGE)),
    "zeropage": lambda uffd, at: uffd.zeropage(at, PAGE),
    "writeprotect": lambda uffd, at: uffd.writeprotect(at, PAGE),
    "poison": lambda uffd, at: uffd.poison(at, PAGE),
    "fill_copy": lambda uffd, at: uffd.fill_copy(at, bytes(2 * PAGE)),
    "fill_zero": lambda uffd, at: uffd.fill_zero(at, PAGE),
    "fill_poison": lambda uffd, at: uffd.fill_poison(at, PAGE),
}


@needs(Feature.POISON)
def test_owner_s_death(orphan: tuple[Userfaultfd, int]) -> None:
    uffd, start = orphan
    for name, call in GONE.items():
        with pytest.raises(ProcessGoneError) as caught:
            call(uffd, start)
        error = caught.value
        assert isinstance(error, ProcessLookupError), name
        assert error.errno == errno.ESRCH
        assert error.start == start
        # The kernel does not change the count here.
        assert getattr(error, "completed", 0) == 0
    assert uffd.read_events() == []
    uffd.wake(start, PAGE)
    with pytest.raises(UffdOSError) as caught_too:
        uffd.register(start, PAGE)
    assert caught_too.value.errno == errno.ENOMEM


def test_a_descriptor_with_an_owner() -> None:
    """It was taken: the first object to be closed closed that of the other."""
    with Userfaultfd() as uffd:
        with pytest.raises(ValueError, match=rf"fd {uffd.fileno()} is that of .*os\.dup"):
            Userfaultfd.from_fd(uffd.fileno())
        fd = os.dup(uffd.fileno())
        with Userfaultfd.from_fd(fd) as other:
            with pytest.raises(ValueError, match="is that of"):
                Userfaultfd.from_fd(fd)
            assert other.read_events() == []
        assert uffd.read_events() == []
        taken = uffd.detach()
    Userfaultfd.from_fd(taken).close()
