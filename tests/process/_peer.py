"""Another process that owns memory, with a socket for descriptors and values.

The peer is a new process, not a fork, and ends with this one.  Both sides send JSON with any number
of descriptors.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyuffd.testing._run import SCALE, STARTUP_S, dotted
from tests._child import ROOT

BUDGET_S = 15.0
_PR_SET_PDEATHSIG = 1
_LONGEST = 1 << 16


class Link:
    """One end of the connection."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[str] | None) -> None:
        self._connection = connection
        self._process = process
        connection.settimeout((STARTUP_S + BUDGET_S) * SCALE)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, value: Any = None, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self._connection, [json.dumps(value).encode()], list(fds))

    def receive(self, max_fds: int = 0) -> tuple[Any, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._connection, _LONGEST, max_fds)
        if not data:
            raise EOFError("the other process has gone")
        return json.loads(data), fds

    def value(self) -> Any:
        return self.receive()[0]

    def wait(self) -> int:
        """Wait for the peer's end; return its exit status."""
        assert self._process is not None
        return self._process.wait(BUDGET_S * SCALE)


@contextmanager
def peer(function: Callable[..., None], *args: Any) -> Iterator[Link]:
    """Run `function(link, *args)` in another process, which must succeed before the block ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-P", "-W", "error", "-m", "tests.process._peer"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), dotted(function), json.dumps(args)],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(theirs.fileno(),),
            text=True,
        )
        with process:
            theirs.close()
            link = Link(ours, process)
            try:
                yield link
                assert link.wait() == 0, "the other process failed; its traceback is on stderr"
            finally:
                process.kill()


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    faulthandler.enable()
    faulthandler.dump_traceback_later((STARTUP_S + BUDGET_S) * SCALE, exit=True)
    fd, target, args = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    os.set_inheritable(fd, False)
    module, name = target.split(":")
    with socket.socket(fileno=fd) as connection:
        getattr(importlib.import_module(module), name)(Link(connection, None), *args)


if __name__ == "__main__":
    _main()
