"""A redis-server for one test, and connections to it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyuffd.testing._run import SCALE


@dataclass
class Redis:
    """A running server."""

    pid: int
    port: int

    def ask(self, *words: str) -> bytes:
        """Return the answer to one command, over a new connection."""
        with Connection(self.port) as connection:
            return connection.ask(*words)


class Connection:
    """One connection, for one command at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10 * SCALE)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, *words: str) -> bytes:
        """Send a command and return the first part of its answer."""
        text = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        self._socket.sendall(text.encode())
        return self._socket.recv(1 << 16)


@contextmanager
def redis(user: str = "root") -> Iterator[Redis]:
    """Run a server with several threads that keeps nothing on disk."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    popen = subprocess.Popen(
        ["redis-server", "--port", str(port), "--save", "", "--io-threads", "2"],
        stdout=subprocess.DEVNULL,
        user=user,
        cwd="/",
    )
    server = Redis(popen.pid, port)
    try:
        give_up = time.monotonic() + 10 * SCALE
        while True:
            try:
                assert server.ask("PING") == b"+PONG\r\n"
                break
            except OSError:
                assert time.monotonic() < give_up
                time.sleep(0.01)
        yield server
    finally:
        popen.send_signal(signal.SIGTERM)
        popen.wait(30 * SCALE)
