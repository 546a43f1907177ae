"""A process that forks the children of tests: as good as new processes, in a tenth of the time.

It has imported what most tests need, has one thread, and has never opened a userfaultfd. A child
leaves the loop and ends like any Python program. But if only the imports of the zygote are left to
free, it does not free them, which would take most of its CPU time.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

from pyuffd.testing._run import Request, perform

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "asyncio",
    "multiprocessing",
    "numpy",
    "psutil",
    "pytest",
    "resource",
    "pyuffd.testing._run",
    "pyuffd.dirty",
    "pyuffd.handlers",
    "pyuffd.handover",
    "pyuffd.pagemap",
    "pyuffd.regions",
    "pyuffd.remote",
    "pyuffd.snapshot",
    "pyuffd.sources",
    "pyuffd.testing",
    "tests._barriers",
    "tests._memory",
)
# numpy's OpenBLAS starts threads when it is imported, and a fork would lack them.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
LENGTH = 4  # bytes of a message's length
WITH_A_WATCHDOG = 2  # threads: faulthandler's watchdog ends a child that takes too long
LIMIT_S = 30.0  # forking takes milliseconds


class Zygote:
    """The zygote, as seen by a test; it has one child at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LIMIT_S)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-W", "error", "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **WITHOUT_THREADS, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
        self._process.wait(LIMIT_S)

    def fork(self, request: Request) -> ForkedChild:
        """Start a child."""
        words = [request.call, dict(request.env), str(Path.cwd())]
        data = json.dumps(words).encode()
        fds = [request.reply, request.stdout, request.stderr]
        socket.send_fds(self._socket, [len(data).to_bytes(LENGTH, "little")], fds)
        self._socket.sendall(data)
        return ForkedChild(self, self._number())

    def reap(self) -> int:
        """Wait for the child's end."""
        self._socket.sendall(b"r")
        return os.waitstatus_to_exitcode(self._number())

    def _number(self) -> int:
        return int.from_bytes(_receive(self._socket, LENGTH), "little")


class ForkedChild:
    """A child of the zygote."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self.pid = pid

    def reap(self) -> int:
        """Wait for its end; return its exit status, or the negative number of its signal."""
        return self._zygote.reap()


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise EOFError("the other process has ended")
        data += part
    return data


def _become_child(fds: list[int], environment: dict[str, str], folder: str) -> None:
    os.setsid()
    for target, fd in enumerate(fds[1:], 1):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()


def threads() -> int:
    """Return the number of threads of this process, including those that run no Python."""
    return len(os.listdir("/proc/self/task"))


def ends_by_itself(thing: object) -> bool:
    """Return whether the interpreter's exit does something to this: a file, a region, ..."""
    kind = type(thing)
    return hasattr(kind, "__del__") or (hasattr(kind, "__exit__") and hasattr(kind, "close"))


def end_early() -> None:
    """End this process without freeing its imports, if nothing else is left.

    Return if a thread, a userfaultfd, a file or the like is left: then the interpreter's exit is
    part of the test. The zygote's own objects are frozen, so they are not examined.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    if threads() == WITH_A_WATCHDOG and not any(map(ends_by_itself, gc.get_objects())):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def serve(sock: socket.socket) -> None:
    """Fork a child for each request, until the other end is closed."""
    for name in NEEDED:
        importlib.import_module(name)
    assert threads() == 1
    gc.freeze()
    while True:
        head, fds, _, _ = socket.recv_fds(sock, LENGTH, 3)
        if not head:
            return
        words = json.loads(_receive(sock, int.from_bytes(head, "little")))
        call, environment, folder = words
        pid = os.fork()
        if pid == 0:
            sock.close()
            _become_child(fds, environment, folder)
            perform(call, fds[0])
            end_early()
            return
        for fd in fds:
            os.close(fd)
        sock.sendall(pid.to_bytes(LENGTH, "little"))
        if not sock.recv(1):
            return
        _, status = os.waitpid(pid, 0)
        sock.sendall(status.to_bytes(LENGTH, "little"))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as own_end:
        serve(own_end)
