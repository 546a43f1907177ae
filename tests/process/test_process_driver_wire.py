"""Messages between the processes of the process driver."""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._calls import Answer, Call, Message
from pyuffd.handlers.process._transport import PackedSource
from tests._child import run_child
from tests.process._process_sources import StubbornError

Pair = tuple[socket.socket, socket.socket]
FIRST = Message(7, Call.ADD, b"first")
NEXT = Message(8, Call.STATS)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_keep_their_order_and_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    read, write = os.pipe()
    _wire.send(ours, Message(1, Call.ADD, b"x" * 1000), (read, write))
    _wire.send(ours, Message(1 << 40, Answer.DONE))
    message, fds = _wire.receive(theirs)
    assert message == Message(1, Call.ADD, b"x" * 1000)
    assert [os.get_inheritable(fd) for fd in fds] == [False, False]
    os.write(fds[1], b"!")
    assert os.read(read, 1) == b"!"
    assert _wire.receive(theirs) == (Message(1 << 40, Answer.DONE), [])
    _wire.close_all([*fds, read, write])


def test_large_message(pair: Pair) -> None:
    ours, theirs = pair
    data = Message(1, Answer.DONE, os.urandom(8 << 20))
    thread = threading.Thread(target=_wire.send, args=(ours, data))
    thread.start()
    assert _wire.receive(theirs) == (data, [])
    thread.join()


def test_bodies_keep_what_travels_beside_them() -> None:
    value = ("before", pickle.PickleBuffer(b""), [pickle.PickleBuffer(b"N." * 9)], {"after": b"x"})
    assert _wire.unpacked(_wire.packed(value)) == ("before", b"", [b"N." * 9], {"after": b"x"})
    for plain in (None, (), "text", (1, b"bytes")):
        assert _wire.unpacked(_wire.packed(plain)) == plain


def test_a_source_travels_beside_the_call() -> None:
    """The keeper, which passes it on, must neither unpickle it nor copy it into a pickle."""
    blob = b"not a pickle" * 1000
    source = PackedSource(blob, {"init_main_from_path": "main.py"}, ["path"], ["argv"])
    body = _wire.packed((source, 1))
    unpickler = pickle.Unpickler(call := io.BytesIO(body), buffers=[blob])
    unpickler.load()
    assert call.tell() <= body.index(blob)
    assert _wire.unpacked(body) == (source, 1)


def test_an_exception_travels_beside_its_description() -> None:
    """If it cannot be unpickled, its text and its notes arrive all the same."""
    error = KeyError("page")
    error.__cause__ = StubbornError("below")
    sent = _wire.failure_of(error, 4096, 8192)
    found = _wire.load_failure(_wire.unpacked(_wire.packed(sent)))
    assert (found.start, found.length) == (4096, 8192)
    assert (type(found.error), found.error.args) == (KeyError, ("page",))
    assert "below" in str(found.error.__cause__)


@pytest.mark.parametrize("sent", [0, 3, 8, 20, 30])
def test_end_inside_a_message(pair: Pair, sent: int) -> None:
    ours, theirs = pair
    before = set(os.listdir("/proc/self/fd"))
    data = _wire.encode(Message(1, Call.ADD, b"x" * 100), 1)[:sent]
    if data:
        socket.send_fds(ours, [data], [ours.fileno()])
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        _wire.receive(theirs)
    assert set(os.listdir("/proc/self/fd")) == before


def test_descriptors_that_do_not_come(pair: Pair) -> None:
    """The message with lost descriptors is known, and the next message is read correctly."""
    ours, theirs = pair
    ours.sendall(_wire.encode(FIRST, 1))
    _wire.send(ours, NEXT)
    with pytest.raises(_wire.DescriptorsLostError) as caught:
        _wire.receive(theirs)
    assert caught.value.message == FIRST
    assert "RLIMIT_NOFILE" in str(caught.value)
    assert _wire.receive(theirs) == (NEXT, [])


@pytest.mark.parametrize("what", ["send", "receive"])
def test_a_process_that_has_ended(pair: Pair, what: str) -> None:
    """A fork of ours may have the other end of the socket, without reading or writing."""
    ours, _ = pair
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pidfd = os.pidfd_open(child.pid)
    try:
        with pytest.raises(EOFError):
            if what == "receive":
                _wire.receive(ours, ended=pidfd)
            else:
                _wire.sendall(ours, bytes(8 << 20), ended=pidfd)
    finally:
        os.close(pidfd)


def without_sigpipe() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    ours, theirs = socket.socketpair()
    theirs.close()
    for fds in ((), (0,)):
        with pytest.raises(BrokenPipeError):
            _wire.send(ours, FIRST, fds)


def test_nobody_reads() -> None:
    """A program may have the default action of SIGPIPE."""
    run_child(without_sigpipe)


def test_errors_travel_with_their_traceback() -> None:
    def fail() -> None:
        raise KeyError("page")

    try:
        fail()
    except KeyError as error:
        found = _wire.load_error(_wire.pickled_error(error))
    assert type(found) is KeyError
    assert found.args == ("page",)
    assert "in fail" in found.__notes__[0]


@pytest.mark.parametrize("where", ["text", "bytes", "attribute", "note"])
def test_long_errors_are_cut(where: str) -> None:
    """A source may raise with gigabytes of its content; 50 MB needed seconds."""
    long = "x" * 3 * _wire.ARGUMENT_MOST
    error = FileNotFoundError(2, "short", long if where == "text" else "name")
    if where == "bytes":
        error.args = (2, "short", long.encode())
    if where == "attribute":
        error.page = [long]  # type: ignore[attr-defined]
    if where == "note":
        error.add_note(long)
    sent = _wire.pickled_error(error)
    assert len(sent) < 2.5 * _wire.ARGUMENT_MOST  # notes come twice
    found = _wire.load_error(sent)
    assert (type(found), found.args[:2]) == (FileNotFoundError, (2, "short"))


def test_long_messages_are_received_in_pieces(pair: Pair) -> None:
    """recvmsg() allocates what it might return each time: that was quadratic."""
    ours, theirs = pair
    asked = list[int]()

    class Receiver:
        def recvmsg(self, size: int, *args: int) -> object:
            asked.append(size)
            return theirs.recvmsg(size, *args)

    body = bytes(8 << 20)
    sender = threading.Thread(target=_wire.send, args=(ours, Message(1, Call.ADD, body)))
    sender.start()
    message, _ = _wire.receive(Receiver())  # type: ignore[arg-type]
    sender.join()
    assert message.body == body
    assert max(asked) <= 1 << 20


def test_errors_that_cannot_travel_are_described() -> None:
    found = _wire.load_error(_wire.pickled_error(StubbornError("kept")))
    assert type(found) is RuntimeError
    assert str(found) == "StubbornError: kept"
