"""Sending a userfaultfd and its ranges to another process, over a socket made for that."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from pyuffd import (
    ClosedError,
    Feature,
    HandoverError,
    Pagefault,
    Region,
    RegisterMode,
    Userfaultfd,
    connect_unix,
    handover,
    listen_unix,
    lowlevel,
    recv_uffd,
    send_uffd,
)
from pyuffd import _handover_format as form
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import next_events
from tests.process._peer import Link, peer

PAGE = 4096
NOBODY = 65534

pytestmark = needs(Feature(0))


def content(page: int, size: int) -> bytes:
    return bytes([65 + page]) * size


# The owners of the memory


def lend(link: Link, path: str, memory: str, memory_too: bool) -> None:
    """Send two regions of missing pages, and read them when told."""
    factory = memory_of(memory)
    with factory.pages(2) as first, factory.pages(1) as second, Userfaultfd() as uffd:
        for region in (first, second):
            uffd.register(region)
        with connect_unix(path) as sock:
            send_uffd(sock, uffd, [first, second], memory=memory_too)
        link.send([first.start, second.start, os.getpid()])
        if link.value() == "read":
            link.send([first.digest("sha256").hex(), second.read(0, 4).decode()])


def lend_minor(link: Link, path: str) -> None:
    with Region.memfd(2 * PAGE) as region, Userfaultfd(features=Feature.MINOR_SHMEM) as uffd:
        uffd.register(region, mode=RegisterMode.MISSING | RegisterMode.MINOR)
        with connect_unix(path) as sock:
            send_uffd(sock, uffd, [region], memory=True)
        link.send(region.read(PAGE, 5).decode())


def lend_as_nobody(link: Link, path: str) -> None:
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with Region.anonymous(PAGE) as region, Userfaultfd(user_mode_only=True) as uffd:
        uffd.register(region)
        for _ in range(2):
            with connect_unix(path) as sock:
                send_uffd(sock, uffd, [region])
                link.send("sent")
                link.value()


# The receivers


@pytest.mark.crossing
@needs_kernel_faults()
@pytest.mark.parametrize("memory_too", [False, True], ids=["uffd", "uffd-and-memory"])
@pytest.mark.parametrize("name", memory_params())
def test_handover(tmp_path: Path, name: str, memory_too: bool) -> None:
    with (
        listen_unix(tmp_path / "s") as listener,
        peer(lend, listener.path, name, memory_too) as link,
    ):
        with listener.accept() as sock:
            received = recv_uffd(sock)
        with received:
            first, second, pid = link.value()
            size = received.regions[0].page_size
            assert size == memory_of(name).page_size
            assert [(it.start, it.length, it.offset) for it in received.regions] == [
                (first, 2 * size, 0),
                (second, size, 0),
            ]
            peer_is = (received.pid, received.uid, received.gid)
            assert peer_is == (pid, os.geteuid(), os.getegid())
            has_fd = memory_too and name != "anon"
            fds = [it.fd for it in received.regions if it.fd is not None]
            assert len(set(fds)) == (2 if has_fd else 0)
            assert not any(map(os.get_inheritable, fds))
            link.send("read")
            for page in range(3):
                start = [first, first + size, second][page]
                received.uffd.fill_copy(start, content(page, size))
            digest, letters = link.value()
    pages = content(0, size) + content(1, size)
    assert digest == hashlib.sha256(pages).hexdigest()
    assert letters == "CCCC"


@needs_kernel_faults()
@needs(Feature.MINOR_SHMEM)
def test_memory_is_mapped_here_for_minor_faults(tmp_path: Path) -> None:
    with (
        listen_unix(tmp_path / "s") as listener,
        peer(lend_minor, listener.path) as link,
        listener.accept() as sock,
        recv_uffd(sock) as received,
    ):
        (there,) = received.regions
        assert there.fd is not None
        with Region.file(there.fd, there.length, offset=there.offset) as alias:
            alias.write(PAGE, b"alias")
            (event,) = next_events(received.uffd)
            assert isinstance(event, Pagefault)
            received.uffd.fill_continue(event.address, PAGE)
            assert link.value() == "alias"


@needs_privilege("CAP_SYS_ADMIN")
def test_another_user_is_refused_unless_allowed() -> None:
    with tempfile.TemporaryDirectory() as folder, listen_unix(f"{folder}/s") as listener:
        os.chmod(folder, 0o755)
        os.chmod(listener.path, 0o666)
        with peer(lend_as_nobody, listener.path) as link:
            with listener.accept() as sock:
                assert link.value() == "sent"
                with pytest.raises(HandoverError) as caught:
                    recv_uffd(sock)
                error = caught.value
                assert (error.reason, error.pid, error.uid) == ("refused", link.pid, NOBODY)
                link.send("once more")
            with listener.accept() as sock, recv_uffd(sock, allow_uids=[NOBODY]) as received:
                assert (received.pid, received.uid) == (link.pid, NOBODY)
                assert link.value() == "sent"
                link.send("that is all")


def test_other_messages_on_the_stream_are_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        for _ in range(2):
            send_uffd(theirs, uffd, [region])
        theirs.sendall(b"and then this")
        for _ in range(2):
            recv_uffd(ours).close()
        assert ours.recv(100) == b"and then this"


def test_as_many_ranges_as_are_taken() -> None:
    """More than the socket's buffer: both ends must work at once."""
    count = handover.MAX_REGIONS
    run_child(many_ranges, count)


def many_ranges(count: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ranges = [handover.HandoverRange(at * PAGE, PAGE, PAGE, at) for at in range(count)]
    with ours, theirs, Userfaultfd() as uffd:
        thread = threading.Thread(target=send_uffd, args=(theirs, uffd, ranges))
        thread.start()
        with recv_uffd(ours) as received:
            assert list(received.regions) == ranges
        thread.join()


def test_received_ranges_can_be_sent_on() -> None:
    first, second, third, fourth = *socket.socketpair(), *socket.socketpair()
    with first, second, third, fourth, Userfaultfd() as uffd:
        with Region.memfd(3 * PAGE) as region:
            send_uffd(first, uffd, [region], memory=True)
        with recv_uffd(second) as received:
            send_uffd(third, received.uffd, received.regions, memory=True)
            with recv_uffd(fourth) as again:
                (here,), (there,) = received.regions, again.regions
                assert here.fd is not None
                assert there.fd is not None
                assert (there.start, there.length) == (here.start, here.length)
                assert os.path.sameopenfile(here.fd, there.fd)


@needs_kernel_faults()
def test_no_handshake_is_no_userfaultfd() -> None:
    ours, theirs = socket.socketpair()
    fd = lowlevel.open_syscall(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with ours, theirs:
            header = form.HEADER.pack(form.MAGIC, 1, 40, 0, 1)
            socket.send_fds(theirs, [header], [fd])
            with pytest.raises(HandoverError) as caught:
                recv_uffd(ours)
            assert caught.value.reason == "not-a-userfaultfd"
    finally:
        os.close(fd)


def test_sending_a_closed_one() -> None:
    ours, theirs = socket.socketpair()
    uffd = Userfaultfd()
    uffd.close()
    with ours, theirs, pytest.raises(ClosedError):
        send_uffd(ours, uffd, [])


def test_no_descriptors_left_in_this_process() -> None:
    run_child(receive_at_the_limit)


def receive_at_the_limit() -> None:
    """The kernel cuts off the descriptors that exceed the limit."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.memfd(PAGE) as region:
        send_uffd(theirs, uffd, [region], memory=True)
        before = os.listdir("/proc/self/fd")
        # One of the two descriptors fits.
        lowest_free = os.dup(0)
        os.close(lowest_free)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
        try:
            with pytest.raises(HandoverError) as caught:
                recv_uffd(ours)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.reason == "truncated"
        assert os.listdir("/proc/self/fd") == before
