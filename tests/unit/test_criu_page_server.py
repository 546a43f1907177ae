"""The client of CRIU's page server, with servers that are right, slow, or hostile."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

pytest.importorskip("google.protobuf")

from pyuffd import ClosedError, CriuError
from pyuffd.criu import RemotePages
from pyuffd.criu._page_server import CLOSE, GET, PAGES_FOLLOW, WIRES, Wire
from pyuffd.criu._remote import PageBroker, RemoteSource
from tests.criu._images import PAGE, pattern
from tests.criu._page_server import Server

BASE = 0x7F0000000000
PID = 77


@contextmanager
def connected(server: Callable[[socket.socket], None], **options: object) -> Iterator[RemotePages]:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server, args=(theirs,))
    thread.start()
    try:
        with RemotePages(ours, **options) as pages:  # type: ignore[arg-type]
            yield pages
    finally:
        theirs.close()
        thread.join()


@pytest.mark.parametrize("wire", ["4.1", "4.2"])
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_reads_pages(wire: Wire, most: int) -> None:
    """The server may send fewer than it was asked for."""
    server = Server(wire, {PID: BASE}, most=most)
    with connected(server.serve, wire=wire) as pages:
        for first, count in ((0, 1), (5, 300), (2, 2)):
            expected = b"".join(pattern(first + number) for number in range(count))
            assert pages.read(PID, BASE + first * PAGE, count * PAGE) == expected
    assert server.was_closed


def test_the_bytes_on_the_wire() -> None:
    assert WIRES["4.1"].pack(GET, 2, 0x1000, 9) == struct.pack("<IIQQ", 7, 2, 0x1000, 9)
    new = WIRES["4.2"].pack(GET, 2, 0x1000, 9)
    assert new == struct.pack("<IIQQQ", 7, 0, 2, 0x1000, 9)
    assert (WIRES["4.1"].size, WIRES["4.2"].size, CLOSE) == (24, 32, 0x1023)


def test_many_threads_at_once() -> None:
    server = Server("4.2", {PID: BASE}, most=2)
    wrong: list[int] = []
    with connected(server.serve) as pages:

        def read(first: int) -> None:
            for number in range(first, 200, 8):
                if pages.read(PID, BASE + number * PAGE, 3 * PAGE) != b"".join(
                    pattern(number + at) for at in range(3)
                ):
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def answer(head: bytes, data: bytes = b"") -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        sock.recv(32)
        try:
            sock.sendall(head + data)
            sock.recv(32)
        except OSError:
            pass

    return serve


def closing(data: bytes) -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        sock.recv(32)
        sock.sendall(data)

    return serve


def head(command: int = PAGES_FOLLOW, pages: int = 1, address: int = BASE, pid: int = PID) -> bytes:
    return WIRES["4.2"].pack(command, pages, address, pid)


HOSTILE = {
    "closes": lambda sock: sock.shutdown(socket.SHUT_RDWR),
    "closes inside a head": closing(head()[:20]),
    "closes inside a page": closing(head() + bytes(100)),
    "another command": answer(head(command=6)),
    "another address": answer(head(address=BASE + PAGE)),
    "another process": answer(head(pid=78)),
    "no pages": answer(head(pages=0)),
    "more pages": answer(head(pages=3)),
    "far more pages": answer(head(pages=1 << 63)),
    "the older format": answer(WIRES["4.1"].pack(PAGES_FOLLOW, 1, BASE, PID), bytes(PAGE)),
    "not asked for": answer(2 * (head(pages=2) + bytes(2 * PAGE))),
    "text": answer(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(name: str) -> None:
    server = HOSTILE[name]

    def serve(sock: socket.socket) -> None:
        with suppress(OSError):  # the client has gone
            server(sock)
            sock.shutdown(socket.SHUT_RDWR)

    with connected(serve) as pages:
        with pytest.raises(CriuError) as caught:
            for _ in range(3):
                pages.read(PID, BASE, 2 * PAGE)
        assert caught.value.reason == "page-server"
        with pytest.raises(CriuError):
            pages.read(PID, BASE, PAGE)


def silent(sock: socket.socket) -> None:
    sock.recv(1 << 16)
    sock.recv(1 << 16)


def test_a_server_that_says_nothing() -> None:
    with (
        connected(silent, timeout_s=0.2) as pages,
        pytest.raises(CriuError, match="nothing"),
    ):
        pages.read(PID, BASE, PAGE)


@pytest.mark.parametrize(
    "arguments", [(0, BASE, PAGE), (1 << 23, BASE, PAGE), (1, 1, PAGE), (1, BASE, 1), (1, BASE, 0)]
)
def test_bad_arguments(arguments: tuple[int, int, int]) -> None:
    with connected(Server("4.2", {}).serve) as pages, pytest.raises(ValueError):
        pages.read(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="wire"):
        RemotePages("localhost", 1, wire="4.0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="port"):
        RemotePages("localhost")
    with socket.socket() as sock, pytest.raises(ValueError, match="connected"):
        RemotePages(sock, 5)


def test_abandoning_says_nothing() -> None:
    server = Server("4.2", {PID: BASE})
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.serve, args=(theirs,))
    thread.start()
    pages = RemotePages(ours)
    pages.read(PID, BASE, PAGE)
    pages.abandon()
    pages.close()
    with pytest.raises(ClosedError):
        pages.read(PID, BASE, PAGE)
    thread.join()
    theirs.close()
    assert not server.was_closed


def test_through_the_broker() -> None:
    """As the worker process does: a page that is lacking is an error there too."""
    with connected(Server("4.2", {PID: BASE}).serve) as pages, PageBroker(pages) as broker:
        source = broker.source(PID)
        assert source.read(BASE + 5 * PAGE, PAGE) == pattern(5)
        kind, args = source.__reduce__()
        again = kind(*args)
        assert isinstance(again, RemoteSource)
        assert again.read(BASE, 2 * PAGE) == pattern(0) + pattern(1)
        with pytest.raises(CriuError, match="lacks a page"):
            again.read(BASE - PAGE, PAGE)
        for one in (source, again):
            one._local.__dict__.pop("sock").close()
