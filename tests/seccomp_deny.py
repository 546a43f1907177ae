"""Run a command under a seccomp filter that refuses userfaultfd(2), like those of containers.

    python tests/seccomp_deny.py COMMAND...

The filter also makes /dev/userfaultfd useless: it refuses the ioctl USERFAULTFD_IOC_NEW.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

NR_IOCTL, NR_USERFAULTFD = 16, 323
USERFAULTFD_IOC_NEW = 0xAA00
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBER, SECOND_ARGUMENT = 0, 16 + 8  # offsets in struct seccomp_data

# Code, jump if true, jump if false, operand; a jump is the number of instructions to skip.
PROGRAM = (
    (LOAD, 0, 0, NUMBER),
    (EQUAL, 4, 0, NR_USERFAULTFD),
    (EQUAL, 0, 2, NR_IOCTL),
    (LOAD, 0, 0, SECOND_ARGUMENT),
    (EQUAL, 1, 0, USERFAULTFD_IOC_NEW),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, ERRNO | errno.EPERM),
)


def deny() -> None:
    """Prevent this process and its children from opening a userfaultfd."""
    _install(PROGRAM)


def deny_call(number: int, code: int = errno.EPERM) -> None:
    """Make a system call fail in this process and its children."""
    _install(
        (
            (LOAD, 0, 0, NUMBER),
            (EQUAL, 1, 0, number),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, ERRNO | code),
        )
    )


def _install(instructions: tuple[tuple[int, int, int, int], ...]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    deny()
    os.execvp(sys.argv[1], sys.argv[1:])
