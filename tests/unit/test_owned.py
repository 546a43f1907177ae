"""Owners of the results of system calls: the call fills them, and they are emptied once."""

from __future__ import annotations

import array
import errno
import gc
import mmap
import os
import resource
import signal
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd._owned import Descriptor, FileName, MappedMemory, Messages, Received
from pyuffd._shim import ffi

PAGE = 4096
MAP_FIXED = 0x10  # not in the mmap module
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


def fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    gc.collect()
    before = fds()
    yield
    assert fds() == before


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def is_mapped(start: int) -> bool:
    return any(
        int(line.split("-")[0], 16) == start
        for line in Path("/proc/self/maps").read_text().splitlines()
    )


def mapped() -> MappedMemory:
    return MappedMemory.map(PAGE, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def test_the_last_reference_closes() -> None:
    fd = Descriptor.open("/dev/null", os.O_RDONLY).number
    assert not is_open(fd)


class Closes:
    """What closes an owner in its `__del__`, as handlers and their helpers do."""

    def __init__(self, owner: Descriptor, seen: list[int]) -> None:
        self.owner, self.seen, self.cycle = owner, seen, self

    def __del__(self) -> None:
        others = [ffi.new("int32_t *", 0x7FFF_FFFF) for _ in range(1000)]
        self.seen.append(self.owner.number)
        self.owner.close()
        del others


def test_closed_after_the_garbage_collector_did() -> None:
    """It ends what is in a cycle in the order in which it was made: here the descriptor first.

    That of free-threaded Python calls `__del__` first.
    """
    seen: list[int] = []
    for _ in range(10):
        Closes(Descriptor.open("/dev/null", os.O_RDONLY), seen)
        gc.collect()
    assert len(seen) == 10
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert seen == [-1] * 10


def test_closes_once() -> None:
    owner = Descriptor.open("/dev/null", os.O_RDONLY)
    owner.close()
    assert not owner.is_open
    assert owner.number == owner.fileno() == -1
    with open("/dev/null") as reuses_the_number:
        owner.close()
        del owner
        assert is_open(reuses_the_number.fileno())


def test_with() -> None:
    with Descriptor.memfd("with", os.MFD_CLOEXEC) as owner:
        fd = owner.number
        assert is_open(fd)
    assert not is_open(fd)


def test_moved_out_of_a_with_block() -> None:
    with Descriptor.duplicate(0) as owner:
        other = owner.moved()
    assert not owner.is_open
    assert is_open(other.number)
    other.close()


def test_released_and_adopted() -> None:
    fd = Descriptor.duplicate(0).release()
    assert is_open(fd)
    owner = Descriptor()
    assert owner.adopt(fd, "value") == "value"
    owner.close()
    assert not is_open(fd)


@pytest.mark.parametrize("how", ["open", "duplicate", "memfd", "process"])
def test_is_not_inherited(how: str) -> None:
    makers = {
        "open": lambda: Descriptor.open("/dev/null", os.O_RDONLY),
        "duplicate": lambda: Descriptor.duplicate(0),
        "memfd": lambda: Descriptor.memfd("x", os.MFD_CLOEXEC),
        "process": lambda: Descriptor.of_process(os.getpid()),
    }
    with makers[how]() as owner:
        assert not os.get_inheritable(owner.number)


def test_errors_are_those_of_os() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Descriptor.open("/no/such/file", os.O_RDONLY)
    assert caught.value.filename == "/no/such/file"
    with pytest.raises(ValueError, match="null"):
        Descriptor.open("/dev/null\0", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Descriptor.duplicate(-1)
    with pytest.raises(ProcessLookupError):
        Descriptor.of_process(1 << 22)


class Interrupted(Exception):
    pass


def test_a_signal_handler_runs_while_opening(tmp_path: Path) -> None:
    """Opening a FIFO waits for its other end; a signal handler that raises ends the wait."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    runs = []

    def handle(number: int, frame: object) -> None:
        runs.append(number)
        if len(runs) == 2:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with pytest.raises(Interrupted):
            Descriptor.open(fifo, os.O_RDONLY)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_last_reference_unmaps() -> None:
    owner = mapped()
    start = owner.start
    assert is_mapped(start)
    other = owner.moved()
    owner.close()
    assert is_mapped(start)
    del other
    assert not is_mapped(start)


def test_unmaps_once() -> None:
    owner = mapped()
    start = owner.start
    owner.close()
    assert owner.start == 0
    with mapped() as reuses_the_place:
        assert reuses_the_place.start == start
        owner.close()
        assert is_mapped(start)


def test_memory_that_stays() -> None:
    with mapped() as owner:
        start = owner.release()
    assert is_mapped(start)
    # Its own owner unmaps a mapping that took the place.
    fixed = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_FIXED
    with MappedMemory.map(PAGE, mmap.PROT_READ, fixed, address=start):
        pass
    assert not is_mapped(start)


def test_a_new_name_goes_unless_it_is_settled(tmp_path: Path) -> None:
    path = str(tmp_path / "name")
    name = FileName()
    with Descriptor.create(path, os.O_RDWR, 0o600, name):
        assert os.path.exists(path)
    del name
    assert not os.path.exists(path)
    name = FileName()
    with Descriptor.create(path, os.O_RDWR, 0o600, name):
        assert name.settle(False, 5) == 5
    del name
    assert os.path.exists(path)


def test_an_old_name_stays_unless_it_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.touch()
    for is_removed in (False, True):
        with path.open() as file, FileName() as name:
            name.note(str(path), file.fileno())
            if is_removed:
                name.settle(True, None)
                name = name.moved()
                name.close()
        assert path.exists() is not is_removed


def test_another_file_s_name_stays(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with FileName() as name, Descriptor.create(str(path), os.O_RDWR, 0o600, name):
        path.unlink()
        path.touch()
    assert path.exists()


def test_a_fork_removes_no_name(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with FileName() as name, Descriptor.create(str(path), os.O_RDWR, 0o600, name):
        pid = os.fork()
        if pid == 0:
            name.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert path.exists()
    assert not path.exists()


def send(sock: socket.socket, data: bytes, count: int) -> None:
    sock.sendmsg([data], [(*RIGHTS, array.array("i", [0] * count))])


def test_received_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Received() as received:
        data = bytearray(8)
        with pytest.raises(BlockingIOError):
            received.receive(ours.fileno(), data)
        send(theirs, b"abc", 2)
        assert received.receive(ours.fileno(), data) == 3
        assert data[:3] == b"abc"
        with received.take(0) as taken:
            assert is_open(taken.number)
            assert not os.get_inheritable(taken.number)
        assert not received.take(0).is_open
        send(theirs, b"d", 1)
        assert received.receive(ours.fileno(), data) == 1
        assert len(received) == 3
        assert not received.is_truncated
        for index in (-1, 3):
            with pytest.raises(IndexError):
                received.take(index)
        theirs.close()
        assert received.receive(ours.fileno(), data) == 0


def test_more_descriptors_than_one_message_can_bring() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Received() as received:
        data = bytearray(1)
        for _ in range(2):
            send(theirs, b"x", received.capacity)
            received.receive(ours.fileno(), data)
        assert len(received) == 2 * received.capacity
        with pytest.raises(IndexError):
            received.take(received.capacity)


def test_messages_that_are_no_messages_yet() -> None:
    messages = Messages(2)
    assert len(messages) == 0
    with pytest.raises(IndexError):
        messages[0]
    messages.close()


@pytest.mark.parametrize("name", ["duplicate", "eventfd", "pipe"])
def test_what_no_descriptor_was_free_for(name: str) -> None:
    """The error says what was to be made, and which limit was met."""
    make = {"duplicate": lambda: Descriptor.duplicate(0)}.get(name) or getattr(Descriptor, name)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(OSError, match="RLIMIT_NOFILE") as caught:
            make()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert caught.value.errno == errno.EMFILE
    assert name in str(caught.value)
