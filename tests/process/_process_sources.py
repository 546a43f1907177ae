"""Page sources that can be sent to the helper process: they are found by name in this module."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import time
from pathlib import Path

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
