"""Post-copy migration over TCP: the receiver works with memory that has not arrived yet.

The sender pushes all of it in order, and a page that is asked for at once. `fill` puts in place
what comes from the socket, in C, while the source only asks: it returns PROMISED, and its page
comes by `fill` like any other. A page is filled once, whichever way it came first.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Iterator

from pyuffd import PROMISED, CallableSource, Handler, Promised, Region, Userfaultfd

PAGE = 4096
LENGTH = 16 << 20
CHUNK = 256 << 10
HEADER = struct.Struct("=QQ")  # offset and length of the content that follows
ASK = struct.Struct("=Q")  # offset of a page that a thread waits for
MEMORY = random.Random(1).randbytes(LENGTH)


def asked_for(sock: socket.socket) -> Iterator[int]:
    """Yield the pages that were asked for by now; TCP may split a message anywhere."""
    with contextlib.suppress(BlockingIOError):
        while len(sock.recv(ASK.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == ASK.size:
            yield ASK.unpack(sock.recv(ASK.size))[0]


def send(sock: socket.socket) -> None:
    """Push everything, and what is asked for in between, until the receiver has all."""
    with sock:
        for offset in range(0, LENGTH, CHUNK):
            for page in asked_for(sock):
                sock.sendall(HEADER.pack(page, PAGE) + MEMORY[page : page + PAGE])
            sock.sendall(HEADER.pack(offset, CHUNK))
            sock.sendall(MEMORY[offset : offset + CHUNK])
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def receive(sock: socket.socket, handler: Handler, region: Region) -> None:
    """Put in place what comes, until the sender has sent all."""
    while header := sock.recv(HEADER.size, socket.MSG_WAITALL):
        offset, length = HEADER.unpack(header)
        handler.fill(region, offset, sock, length)


def migrate(sock: socket.socket) -> None:
    """Touch pages here and there while the memory arrives, then verify all of it."""
    asked: list[int] = []

    def ask(offset: int, length: int) -> Promised:
        asked.append(offset)
        sock.sendall(ASK.pack(offset))
        return PROMISED

    with (
        Userfaultfd() as uffd,
        Region.anonymous(LENGTH) as region,
        # A peer may be slow; stop() still ends the wait.
        Handler(uffd, driver="thread", stall_timeout_s=math.inf) as handler,
    ):
        handler.serve(region, CallableSource(ask))
        pusher = threading.Thread(target=receive, args=(sock, handler, region))
        pusher.start()
        for page in random.Random(2).sample(range(LENGTH // PAGE), 200):
            assert region.read(page * PAGE, 16) == MEMORY[page * PAGE :][:16]
        pusher.join()
        sock.shutdown(socket.SHUT_WR)
        assert region.read(0, LENGTH) == MEMORY
        stats = handler.stats()
        print(f"{stats.filled_pages} pages came, {len(asked)} of them were asked for first")
        assert stats.filled_pages == LENGTH // PAGE


def main() -> None:
    """Run sender and receiver over the loopback device."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    sender = threading.Thread(target=send, args=(theirs,))
    sender.start()
    with ours:
        migrate(ours)
    sender.join()
    print("all of the memory has arrived")


if __name__ == "__main__":
    main()
