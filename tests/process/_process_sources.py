"""Page sources that can be sent to the helper process: they are found by name in this module."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from pyuffd._shim import lib
from tests._barriers import WAIT_NS, Point
from tests._memory import PAGE

__all__ = ["PAGE"]


def content(length: int, seed: int = 0) -> bytes:
    """Return what `page` says for a region: each page its own byte."""
    return b"".join(bytes([(seed + index) % 251 + 1]) * PAGE for index in range(length // PAGE))


def page(offset: int, length: int) -> bytes:
    """Return the bytes of `content`."""
    return content(offset + length)[offset:]


async def page_later(offset: int, length: int) -> bytes:
    """Return the bytes of `content`, with other tasks in between."""
    await asyncio.sleep(0.001)
    return page(offset, length)


def broken(offset: int, length: int) -> bytes:
    """Fail."""
    raise LookupError(f"no page at {offset:#x}")


class StubbornError(Exception):
    """An exception that cannot be pickled."""

    def __reduce__(self) -> str:
        raise TypeError("not this one")


def stubborn(offset: int, length: int) -> bytes:
    """Fail, in a way that cannot be sent."""
    raise StubbornError("kept here")


def refused(offset: int, length: int) -> bytes:
    """Fail with an errno."""
    raise OSError(errno.EACCES, "not for you")


def short(offset: int, length: int) -> bytes:
    """Return too little."""
    return b"x" * (length - 1)


def hanging(offset: int, length: int) -> bytes:
    """Take far too long."""
    time.sleep(3600)
    return bytes(length)


def slow(offset: int, length: int) -> bytes:
    """Take 50 ms."""
    time.sleep(0.05)
    return page(offset, length)


def talking(offset: int, length: int) -> bytes:
    """Return the bytes of `content`, and write to the standard streams, whatever these are."""
    for fd in (1, 2):
        os.write(fd, b"asked\n")
    print("for", offset, flush=True)
    return page(offset, length)


def ignored_signals(offset: int, length: int) -> bytes:
    """Return which signals a process ignores that is started here."""
    program = "grep SigIgn /proc/self/status"
    text = subprocess.run(["sh", "-c", program], capture_output=True, check=True).stdout
    # 32 and 33 are the C library's own: a program started by its posix_spawn() (by make, say) may
    # be left with them ignored, and sigaction() does not touch them.
    ignored = int(text.split()[1], 16) & ~(1 << 31 | 1 << 32)
    return ignored.to_bytes(8, "little").ljust(length, b"\0")


class Source:
    """A source with data of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.length = None

    def read(self, offset: int, length: int) -> bytes:
        """Return `content` of the seed."""
        return content(offset + length, self.seed)[offset:]


class Noting(Source):
    """Writes each call to a file."""

    def __init__(self, path: str) -> None:
        super().__init__(0)
        self.path = path

    def read(self, offset: int, length: int) -> bytes:
        """Note, and return `content`."""
        with Path(self.path).open("a") as file:
            file.write(f"{offset} {length}\n")
        return super().read(offset, length)


class KilledOnce(Source):
    """Kills its process the first time it is called."""

    def __init__(self, path: str) -> None:
        super().__init__(0)
        self.path = path

    def read(self, offset: int, length: int) -> bytes:
        """Die, or return `content`."""
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().read(offset, length)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def crashing(offset: int, length: int) -> bytes:
    """End its process in the usual way of C code that goes wrong."""
    ctypes.string_at(0)
    return bytes(length)


class Gate(Source):
    """Says that it was called, and waits for a file to exist."""

    def __init__(self, called: str, path: str) -> None:
        super().__init__(0)
        self.called = called
        self.path = path

    def read(self, offset: int, length: int) -> bytes:
        """Wait, and return `content`."""
        with Path(self.called).open("a") as file:
            file.write(f"{offset}\n")
        while not Path(self.path).exists():
            time.sleep(0.001)
        return super().read(offset, length)


class Points(Source):
    """Lets the test hold the first worker at the engine's points (`WorkerPoints`).

    With a file `die` in the folder, the next worker that loads this is killed by it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(0)
        self.folder = folder

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        die = Path(self.folder, "die")
        if die.exists():
            die.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def read(self, offset: int, length: int) -> bytes:
        """Listen from the first call on; return `content`."""
        try:
            os.close(os.open(f"{self.folder}/listening", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().read(offset, length)
        threading.Thread(target=self._listen, daemon=True).start()
        return super().read(offset, length)

    def _listen(self) -> None:
        with open(f"{self.folder}/commands") as commands, open(f"{self.folder}/answers", "w") as to:
            for line in commands:
                name, number = line.split()
                print(self._do(name, Point(int(number))), file=to, flush=True)

    def _do(self, name: str, point: Point) -> int:
        if name == "arm":
            return lib.uffd_barrier_arm(point)
        if name == "wait":
            return lib.uffd_barrier_wait(point, WAIT_NS)
        lib.uffd_barrier_release(point)
        return 0


class WorkerPoints:
    """The other end of `Points`, in the test."""

    def __init__(self, folder: str) -> None:
        self.source = Points(folder)
        for name in ("commands", "answers"):
            os.mkfifo(f"{folder}/{name}")

    def connect(self) -> None:
        """Return when the worker listens; its source has been asked for a page."""
        self._commands = open(f"{self.source.folder}/commands", "w")  # noqa: SIM115
        self._answers = open(f"{self.source.folder}/answers")  # noqa: SIM115

    def _ask(self, name: str, point: Point) -> None:
        print(name, int(point), file=self._commands, flush=True)
        assert self._answers.readline() == "0\n", f"{name} {point.name}"

    def arm(self, point: Point) -> None:
        """Let the worker's next thread that comes to the point stop there."""
        self._ask("arm", point)

    def wait(self, point: Point) -> None:
        """Return when one stands there."""
        self._ask("wait", point)

    def release(self, point: Point) -> None:
        """Let it go on."""
        self._ask("release", point)

    def close(self) -> None:
        """Let go of the pipes."""
        self._commands.close()
        self._answers.close()
