"""Sockets that only their user can reach, and sending to the wrong peers."""

from __future__ import annotations

import errno
import gc
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyuffd import (
    ClosedError,
    HandoverError,
    _unix_sockets,
    connect_unix,
    handover,
    listen_unix,
    send_uffd,
)
from pyuffd._handover_format import MAX_MEMORY_FDS
from pyuffd.testing import needs_privilege
from tests.kernel._faults import fork

PAGE = 4096
NOBODY = 65534
SHORT_S = 0.05


@contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


class Range:
    """A range that does not exist: the kernel does not look at what is sent."""

    def __init__(self, start: int = PAGE, length: int = PAGE, **more: int) -> None:
        self.start, self.length = start, length
        vars(self).update(more)

    def __repr__(self) -> str:
        return ",".join(f"{name}={value:#x}" for name, value in vars(self).items())


class Uffd:
    """Replaces a userfaultfd: a descriptor that can be sent."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _note_sent(self, pid: int) -> None:
        assert pid == os.getpid()  # the process that made the socket pair

    def fileno(self) -> int:
        return self.fd


@pytest.fixture
def uffd() -> Iterator[Uffd]:
    fd = os.eventfd(0)
    yield Uffd(fd)
    os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def send(sock: socket.socket, uffd: Uffd, *ranges: Range, **options: object) -> None:
    send_uffd(sock, uffd, ranges, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177])
def test_mode_is_0600_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    # Only bind(2) sets the mode of the file, so this is its mode from the start.
    with umask(mask), listen_unix(tmp_path / "s") as listener:
        status = os.lstat(listener.path)
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert os.umask(mask) == mask


def test_mode_is_not_changed_after_bind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *args: object, **options: object) -> None:
        raise AssertionError(f"chmod of {path}: the file had another mode before")

    monkeypatch.setattr(os, "chmod", refuse)
    with umask(0), listen_unix(tmp_path / "s") as listener:
        assert stat.S_IMODE(os.lstat(listener.path).st_mode) == 0o600


@needs_privilege("CAP_SYS_ADMIN")
def test_another_user_cannot_connect() -> None:
    # pytest's own folders are closed to other users, so they would prove nothing.
    with tempfile.TemporaryDirectory() as folder, umask(0):
        os.chmod(folder, 0o755)
        with listen_unix(f"{folder}/s") as listener:
            assert not nobody_connects(listener.path)
            os.chmod(listener.path, 0o666)
            assert nobody_connects(listener.path)


def nobody_connects(path: str) -> bool:
    pid = fork()
    if pid == 0:
        status = 2
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            connect_unix(path)
            status = 0
        except PermissionError:
            status = 1
        finally:
            os._exit(status)
    return {0: True, 1: False}[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]


def test_accept_and_connect(tmp_path: Path) -> None:
    with (
        listen_unix(tmp_path / "s") as listener,
        connect_unix(listener.path) as theirs,
        listener.accept() as ours,
    ):
        assert (ours.getblocking(), theirs.getblocking()) == (True, True)
        assert not os.get_inheritable(ours.fileno())
        theirs.sendall(b"x")
        assert ours.recv(2) == b"x"


def test_close_removes_the_file_and_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen_unix(path) as first:
        path.rename(tmp_path / "moved")
        with listen_unix(path):
            first.close()
            first.close()
            assert path.is_socket()
    assert not path.exists()


def test_the_collector_removes_the_file_too(tmp_path: Path) -> None:
    """It finalizes the members of a circle in any order, so the socket may be closed before."""
    listener = listen_unix(tmp_path / "name")
    circle = [listener]
    listener.__dict__["circle"] = circle
    listener._sock.close()  # as its own destructor does
    with pytest.warns(ResourceWarning, match="unclosed <UnixListener"):
        del listener, circle
        gc.collect()
    assert not list(tmp_path.iterdir())


def test_close_in_a_fork_leaves_the_file(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "s") as listener:
        pid = fork()
        if pid == 0:
            listener.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert Path(listener.path).is_socket()


def test_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(OSError) as caught:
        listen_unix(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["", "\0abstract", "a\0b", "/tmp/" + "x" * 103])
def test_bad_paths(path: str) -> None:
    for function in (listen_unix, connect_unix):
        with pytest.raises(ValueError):
            function(path)


def test_longest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listen_unix("x" * _unix_sockets.PATH_LIMIT) as listener, connect_unix(listener.path):
        pass


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect_unix(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
    with pytest.raises(ConnectionRefusedError):
        connect_unix(tmp_path / "s")


def test_full_queue_is_a_time_out(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "s", backlog=0) as listener, connect_unix(listener.path):
        with pytest.raises(HandoverError) as caught:
            connect_unix(listener.path, timeout_s=SHORT_S)
        assert caught.value.reason == "timeout"


def test_nobody_connects(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "s") as listener:
        with pytest.raises(HandoverError) as caught:
            listener.accept(timeout_s=SHORT_S)
        assert caught.value.reason == "timeout"


def test_accept_after_close(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    listener.close()
    with pytest.raises(ClosedError):
        listener.accept()


def test_send_to_another_user(pair: tuple[socket.socket, socket.socket], uffd: Uffd) -> None:
    ours, theirs = pair
    with pytest.raises(HandoverError) as caught:
        send(ours, uffd, Range(), allow_uids=[os.geteuid() + 1])
    assert caught.value.reason == "refused"
    ours.close()
    assert theirs.recv(1) == b""


def test_send_to_a_closed_peer(pair: tuple[socket.socket, socket.socket], uffd: Uffd) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(HandoverError) as caught:
        send(ours, uffd, Range())
    assert (caught.value.reason, caught.value.pid) == ("closed", os.getpid())


def test_send_to_a_peer_that_does_not_read(
    pair: tuple[socket.socket, socket.socket], uffd: Uffd
) -> None:
    ours, _ = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ranges = [Range(at * PAGE) for at in range(handover.MAX_REGIONS)]
    with pytest.raises(HandoverError) as caught:
        send(ours, uffd, *ranges, timeout_s=SHORT_S)
    assert caught.value.reason == "timeout"


@pytest.mark.parametrize(
    "ranges",
    [
        [Range(1)],
        [Range(0, 0)],
        [Range(0, -PAGE)],
        [Range(-PAGE)],
        [Range(2**64 - PAGE, 2 * PAGE)],
        [Range(page_size=8192)],
        [Range(PAGE, PAGE, page_size=2 << 20)],
        [Range(offset=-1)],
        [Range(offset=2**63)],
        [Range(0, 2 * PAGE), Range(PAGE)],
        [Range(), Range()],
    ],
    ids=repr,
)
def test_bad_ranges_are_not_sent(
    pair: tuple[socket.socket, socket.socket], uffd: Uffd, ranges: list[Range]
) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError):
        send(ours, uffd, *ranges)
    ours.close()
    assert theirs.recv(1) == b""


def test_more_memory_than_a_message_takes(
    pair: tuple[socket.socket, socket.socket], uffd: Uffd
) -> None:
    with ExitStack() as stack:
        ranges = []
        for at in range(MAX_MEMORY_FDS + 1):
            fd = os.dup(uffd.fd)
            stack.callback(os.close, fd)
            ranges.append(Range(at * PAGE, fd=fd))
        with pytest.raises(ValueError):
            send(pair[0], uffd, *ranges, memory=True)
        send(pair[0], uffd, *ranges[1:], memory=True)
        data, fds, _, _ = socket.recv_fds(pair[1], 1 << 16, 253)
        for fd in fds:
            os.close(fd)
        assert (len(fds), len(data)) == (253, 20 + 252 * 40)
