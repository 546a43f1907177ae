"""A redis-server to measure beside, and redis-benchmark as its load."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

from benchmarks._pairs import MemberError

_START_S = 60.0
_VALUE = 1024


def lacking() -> str:
    """Return which of the programs is not installed, or an empty string."""
    for program in ("redis-server", "redis-benchmark"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    return ""


class Redis:
    """A server with keys, and the load on it.

    Attributes:
        popen: The server.
        keys: How many keys it has, of 1 KiB each.
    """

    def __init__(self, folder: Path, keys: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.keys = keys
        self.popen = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--save", "", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
        )
        self._wait_for_start()
        self.command("DEBUG", "POPULATE", str(keys), "key", str(_VALUE))

    def _wait_for_start(self) -> None:
        give_up = time.monotonic() + _START_S
        while True:
            try:
                self.command("PING")
                return
            except OSError:
                if time.monotonic() > give_up:
                    raise MemberError("redis-server does not answer") from None
                time.sleep(0.05)

    def command(self, *words: str) -> str:
        """Return the first line of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_START_S) as connection:
            text = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
            connection.sendall(f"*{len(words)}\r\n{text}".encode())
            answer = connection.makefile("rb").readline()
        return answer.decode().rstrip()

    def load(self, requests: int) -> tuple[float, float]:
        """Run redis-benchmark; return requests a second, and p99 in milliseconds."""
        done = subprocess.run(
            [
                *("redis-benchmark", "-p", str(self.port), "-t", "set", "-n", str(requests)),
                *("-r", str(self.keys), "-d", str(_VALUE), "--csv"),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        fields = [word.strip('"') for word in done.stdout.splitlines()[-1].split(",")]
        return float(fields[1]), float(fields[6])

    def saves(self) -> bool:
        """Whether a BGSAVE is under way."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_START_S) as connection:
            connection.sendall(b"INFO persistence\r\n")
            text = connection.recv(1 << 16).decode()
        return "rdb_bgsave_in_progress:1" in text

    def close(self) -> None:
        """End it."""
        self.popen.kill()
        self.popen.wait()
