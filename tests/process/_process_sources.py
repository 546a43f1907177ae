"""Page sources for the helper process, which finds them by name in this module."""

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
    """Return the content of a region, in which each page is full of one byte."""
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
    """Fail with an exception that cannot be pickled."""
    raise StubbornError("kept here")


def refused(offset: int, length: int) -> bytes:
    """Fail with an errno."""
    raise OSError(errno.EACCES, "not for you")


def forks(offset: int, length: int) -> bytes:
    """Fork, and come back from both processes."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 1
    return page(offset, length)


async def forks_later(offset: int, length: int) -> bytes:
    """The same, in a coroutine."""
    await asyncio.sleep(0)
    return forks(offset, length)


def forks_and_raises(offset: int, length: int) -> bytes:
    """Fork, and raise in the child."""
    child = os.fork()
    if not child:
        raise LookupError("in the child")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    return page(offset, length)


def short(offset: int, length: int) -> bytes:
    """Return too few bytes."""
    return b"x" * (length - 1)


def hanging(offset: int, length: int) -> bytes:
    """Take far too long."""
    time.sleep(3600)
    return bytes(length)


def slow(offset: int, length: int) -> bytes:
    """Take 0.25 s."""
    time.sleep(0.25)
    return page(offset, length)


def talking(offset: int, length: int) -> bytes:
    """Return the bytes of `content`, and write to the standard streams."""
    for fd in (1, 2):
        os.write(fd, b"asked\n")
    print("for", offset, flush=True)
    return page(offset, length)


def ignored_signals(offset: int, length: int) -> bytes:
    """Return which signals a process ignores if it is started here."""
    program = "grep SigIgn /proc/self/status"
    text = subprocess.run(["sh", "-c", program], capture_output=True, check=True).stdout
    # 32 and 33 belong to the C library: a program started by its posix_spawn() (by make, for
    # example) may have them ignored, and sigaction() does not change them.
    ignored = int(text.split()[1], 16) & ~(1 << 31 | 1 << 32)
    return ignored.to_bytes(8, "little").ljust(length, b"\0")


class Source:
    """A source with its own data."""

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
        """Write the call, and return `content`."""
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
    """Crash its process, as faulty C code usually does."""
    ctypes.string_at(0)
    return bytes(length)


class Gate(Source):
    """Reports that it was called, and waits for a file to exist."""

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
    """Lets the test stop the first worker process at the engine's points (`WorkerPoints`).

    If the folder has a file `die`, this object kills the next worker process that loads it.
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
        """Listen after the first call; return `content`."""
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
    """The end of `Points` in the test."""

    def __init__(self, folder: str) -> None:
        self.source = Points(folder)
        for name in ("commands", "answers"):
            os.mkfifo(f"{folder}/{name}")

    def connect(self) -> None:
        """Wait until the worker process listens, which it does after the first page was read."""
        self._commands = open(f"{self.source.folder}/commands", "w")  # noqa: SIM115
        self._answers = open(f"{self.source.folder}/answers")  # noqa: SIM115

    def _ask(self, name: str, point: Point) -> None:
        print(name, int(point), file=self._commands, flush=True)
        assert self._answers.readline() == "0\n", f"{name} {point.name}"

    def arm(self, point: Point) -> None:
        """Stop the next thread of the worker process that reaches the point."""
        self._ask("arm", point)

    def wait(self, point: Point) -> None:
        """Wait until a thread is at the point."""
        self._ask("wait", point)

    def release(self, point: Point) -> None:
        """Let the thread continue."""
        self._ask("release", point)

    def close(self) -> None:
        """Close the pipes."""
        self._commands.close()
        self._answers.close()


LONG = 1_000_000


def long_text(offset: int, length: int) -> bytes:
    """Fail with a long message."""
    raise ValueError("x" * LONG)


class NoText(Exception):
    """An exception whose text cannot be read."""

    def __str__(self) -> str:
        return str(1 // 0)


def no_text(offset: int, length: int) -> bytes:
    """Fail with an exception that has no text."""
    if offset == 0:
        raise NoText
    return b"g" * length


async def exits(offset: int, length: int) -> bytes:
    """Try to end the loop."""
    if offset == 0:
        raise SystemExit(3)
    return b"g" * length


def no_errno(offset: int, length: int) -> bytes:
    """Fail with an OSError whose errno is a text."""
    if offset == 0:
        raise OSError("no such page", "file")
    return b"g" * length


def huge_errno(offset: int, length: int) -> bytes:
    """Fail with a number that is too large for an errno."""
    if offset == 0:
        raise OSError(1 << 40, "too much")
    return b"g" * length
