"""`Poll`: as `select.poll`, for a few descriptors, whatever RLIMIT_NOFILE is."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time

import pytest

from pyuffd._errors import UffdOSError
from pyuffd._polling import Poll
from tests._child import run_child

MOST = 8


def test_tells_what_is_ready() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        poll = Poll()
        poll.register(ours, select.POLLIN)
        poll.register(theirs, select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == [(theirs.fileno(), select.POLLOUT)]
        theirs.send(b"x")
        assert (ours.fileno(), select.POLLIN) in poll.poll()


def test_gives_up_in_time() -> None:
    read_fd, write_fd = os.pipe()
    with open(read_fd), open(write_fd, "w"):
        poll = Poll()
        poll.register(read_fd, select.POLLIN)
        begin = time.monotonic()
        assert poll.poll(20.5) == []
        assert time.monotonic() - begin >= 0.0205


def test_refuses_too_many_and_closed_ones() -> None:
    read_fd, write_fd = os.pipe()
    fds = [os.dup(read_fd) for _ in range(MOST)]
    poll = Poll()
    try:
        os.write(write_fd, b"x")
        for fd in fds:
            poll.register(fd, select.POLLIN)
        assert [fd for fd, _ in poll.poll(0)] == fds
        poll.register(read_fd, select.POLLIN)
        with pytest.raises(UffdOSError) as caught:
            poll.poll(0)
        assert caught.value.errno == errno.EINVAL
    finally:
        for fd in (*fds, read_fd, write_fd):
            os.close(fd)
    with socket.socket() as closed:
        pass
    with pytest.raises(ValueError, match="is closed"):
        poll.register(closed, select.POLLIN)


def in_a_sandbox() -> list[bool]:
    """Wait beyond RLIMIT_NOFILE, and be interrupted."""
    import resource

    read_fd, write_fd = os.pipe()
    poll = Poll()
    poll.register(read_fd, select.POLLIN)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))

    def write(*_: object) -> None:
        os.write(write_fd, b"x")

    signal.signal(signal.SIGALRM, write)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    found = [fd == read_fd for fd, _ in poll.poll()]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    os.read(read_fd, 1)
    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        poll.poll()
    except ZeroDivisionError:
        found.append(True)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return found


def test_beyond_the_limit_and_in_signals() -> None:
    assert run_child(in_a_sandbox).value == [True, True]
