"""Raw ioctls, with arguments that the library refuses, and with the result fields that it hides."""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass

from pyuffd._uffd import Userfaultfd

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_READ, _WRITE = 2 << 30, 1 << 30
# name: (direction, number, 64-bit words of the argument)
_IOCTLS = {
    "API": (_READ | _WRITE, 0x3F, 3),
    "REGISTER": (_READ | _WRITE, 0x00, 4),
    "UNREGISTER": (_READ, 0x01, 2),
    "WAKE": (_READ, 0x02, 2),
    "COPY": (_READ | _WRITE, 0x03, 5),
    "ZEROPAGE": (_READ | _WRITE, 0x04, 4),
    "MOVE": (_READ | _WRITE, 0x05, 5),
    "WRITEPROTECT": (_READ | _WRITE, 0x06, 3),
    "CONTINUE": (_READ | _WRITE, 0x07, 4),
    "POISON": (_READ | _WRITE, 0x08, 4),
    "RWPROTECT": (_READ | _WRITE, 0x09, 3),
    "SET_MODE": (_WRITE, 0x0A, 2),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of an ioctl: errno (0 for success) and its argument afterwards.

    If a call returned more than 0, which is a bug, errno is that number, negated.
    """

    errno: int
    words: tuple[int, ...]

    @property
    def result(self) -> int:
        """The last word, signed: `.copy`, `.zeropage`, `.ioctls`, ..."""
        return self.words[-1] - (1 << 64 if self.words[-1] >> 63 else 0)

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, f"returned {-self.errno}") if self.errno else "ok"
        return f"{name}, argument {[hex(word) for word in self.words]}"


def request(name: str) -> int:
    """Return the request number of an ioctl."""
    direction, number, words = _IOCTLS[name]
    return direction | words * 8 << 16 | 0xAA << 8 | number


def ioctl(uffd: Userfaultfd | int, name: str, *words: int) -> Answer:
    """Make one ioctl with exactly these 64-bit words, padded with zeros.

    GIL: released.
    """
    count = _IOCTLS[name][2]
    argument = bytearray(struct.pack(f"={count}Q", *words, *[0] * (count - len(words))))
    fd = uffd if isinstance(uffd, int) else uffd.fileno()
    return Answer(-call(fd, request(name), argument), struct.unpack(f"={count}Q", argument))


def call(fd: int, number: int, argument: bytearray) -> int:
    """Make one ioctl; return what it returns, or -errno.

    A failed ioctl of userfaultfd has an answer in its argument too, but fcntl.ioctl makes the call
    with a copy, and from Python 3.14 on copies it back only if the call succeeds.

    GIL: released.
    """
    result = int(_LIBC.ioctl(fd, number, (ctypes.c_char * len(argument)).from_buffer(argument)))
    return -ctypes.get_errno() if result < 0 else result
