"""The exceptions (layer L1), and `raise_errno`, which turns an errno into one of them.

Each class is also the builtin class that Python chooses for the errno (PEP 3151), so that
`except FileExistsError` works. `errno` is set, further data are attributes, and all can be pickled.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, NoReturn, Self

from pyuffd._describe import human_size


class UffdError(Exception):
    """The base class of pyuffd's exceptions; bad arguments raise ValueError or TypeError."""


class UffdOSError(UffdError, OSError):
    """A system call failed; `errno` says why.

    Attributes:
        op: The operation, such as "UFFDIO_COPY".
        start: The address of its range, or None.
        length: The length of its range in bytes, or None.
        hint: The likely cause, or what would make it work; "" if that is unknown.
        data: The further data of the error by name, which are attributes too.
    """

    op: str
    start: int | None
    length: int | None
    hint: str

    def __init__(
        self,
        code: int,
        op: str,
        start: int | None = None,
        length: int | None = None,
        hint: str = "",
        **data: Any,
    ) -> None:
        """Build the message from the operation, the range and the errno's text."""
        place = ""
        if start is not None:
            place = f" [{start:#x}, +{length:#x})" if length is not None else f" at {start:#x}"
        text = f"{op}{place}: {os.strerror(code)}"
        details = ", ".join(
            f"{key}={value:#x}" if isinstance(value, int) else f"{key}={value}"
            for key, value in data.items()
            if key != "filename"  # OSError puts it into its text itself
        )
        if details:
            text += f" ({details})"
        if hint:
            text += f"; {hint}"
        super().__init__(code, text)
        self.op = op
        self.start = start
        self.length = length
        self.hint = hint
        self.data = data
        for key, value in data.items():
            setattr(self, key, value)

    def with_hint(self, hint: str) -> Self:
        """Return the same error with a hint."""
        return type(self)(self.errno or 0, self.op, self.start, self.length, hint, **self.data)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments of the constructor."""
        arguments = (self.errno, self.op, self.start, self.length, self.hint, self.data)
        return _rebuild, (type(self), *arguments)


def _rebuild(
    cls: type[UffdOSError],
    code: int,
    op: str,
    start: int | None,
    length: int | None,
    hint: str,
    data: dict[str, Any],
) -> UffdOSError:
    return cls(code, op, start, length, hint, **data)


class UffdPermissionError(UffdOSError, PermissionError):
    """EPERM or EACCES, as from opening a userfaultfd without privilege; `hint` names a remedy."""


class UnsupportedFeatureError(UffdOSError):
    """This kernel does not support what was requested.

    Attributes:
        requested: The requested bits.
        supported: The bits that this kernel supports.
        missing: The requested bits that it does not support.
    """

    requested: int
    supported: int
    missing: int


class RangeBusyError(UffdOSError):
    """EBUSY: the range is registered with another userfaultfd, or a page cannot be moved now."""


class PageExistsError(UffdOSError, FileExistsError):
    """EEXIST: the page is already present. Threads may still wait for it: wake them."""


class PartialResolveError(UffdOSError, BlockingIOError):
    """EAGAIN: a part was done, or the layout is changing; retry the rest.

    Attributes:
        completed: The number of bytes that were done.
    """

    completed: int


class LayoutChangedError(UffdOSError, FileNotFoundError):
    """ENOENT: the range is gone, has moved, or is not registered in the needed mode."""


class ProcessGoneError(UffdOSError, ProcessLookupError):
    """ESRCH (ENOSPC before Linux 4.13): the process, or its address space, is gone."""


class StopTimeoutError(UffdOSError, TimeoutError):
    """ETIMEDOUT: a thread did not stop in time; everything runs again.

    Attributes:
        tid: The thread.
        state: The letter of its state: D waits in the kernel, uninterruptibly.
    """

    tid: int
    state: str


class PagePoisonedError(UffdOSError):
    """EHWPOISON: an access to a page whose content is lost; a direct access raises SIGBUS.

    If a handler knows why the content is lost, that is the exception's `__cause__`.

    Attributes:
        start: The address of the page.
        length: The size of the page in bytes.
        address: The address of the access.
        offset: The offset of the page in its region in bytes, or None.
    """

    address: int
    offset: int | None


class ClosedError(UffdError, ValueError):
    """The object is closed, or it belongs to the process from which this one was forked."""


class HandlerError(UffdError, RuntimeError):
    """A handler or its page source failed.

    Attributes:
        start: The address of the first page that failed, or None.
        length: The length in bytes, or None.
    """

    start: int | None
    length: int | None

    def __init__(self, text: str, start: int | None = None, length: int | None = None) -> None:
        """Store the text and the range."""
        super().__init__(text, start, length)
        self.start = start
        self.length = length

    def __str__(self) -> str:
        return str(self.args[0])


class HelperLostError(HandlerError):
    """The helper process has ended, was killed, or could not start.

    Raised by the methods of the `Handler`. `on_error` applies to each missing page that a thread
    touches from then on. stop() does its work anyway, poisons the other missing pages, and then
    raises it.
    """


HandoverReason = Literal[
    "closed",
    "timeout",
    "refused",
    "format",
    "version",
    "too-large",
    "truncated",
    "descriptors",
    "not-a-userfaultfd",
    "ranges",
    "memory",
]


class HandoverError(UffdError):
    """Handing over a userfaultfd failed; all descriptors that were received are closed.

    Attributes:
        reason: The kind of failure, one of `HandoverReason`; `recv_uffd` describes them.
        pid: The peer's pid, from the kernel, or None.
        uid: The peer's effective user, from the kernel, or None.
    """

    reason: HandoverReason
    pid: int | None
    uid: int | None

    def __init__(
        self, reason: HandoverReason, text: str, pid: int | None = None, uid: int | None = None
    ) -> None:
        """Store the reason, the text and the peer."""
        super().__init__(reason, text, pid, uid)
        self.reason = reason
        self.pid = pid
        self.uid = uid

    def __str__(self) -> str:
        peer = "" if self.pid is None else f" (peer: pid {self.pid}, uid {self.uid})"
        return f"{self.args[1]}{peer}"


SnapshotReason = Literal["busy", "shared", "stalled", "parent", "ended", "gaps", "registers"]


class SnapshotError(UffdError, RuntimeError):
    """A snapshot was not taken, or not restored; what it is of is as before, and nothing is left.

    Attributes:
        reason: "busy": another snapshot of the process is being taken. "shared": it has memory that
            others write too, which has no instant. "stalled": it would have had to wait for longer
            than `max_stall_s`. "parent": the parent is not the snapshot that the tracker or the
            memory belongs to. "ended": the process has exited or replaced its memory meanwhile.
            "gaps": the snapshot does not have all of the memory that is to be restored.
            "registers": it has no registers, which a core needs.
    """

    reason: SnapshotReason

    def __init__(self, reason: SnapshotReason, text: str) -> None:
        """Store the reason and the text."""
        super().__init__(reason, text)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


CriuReason = Literal["image", "restore", "page-server"]


class CriuError(UffdError):
    """An image of CRIU, its restore or its page server broke CRIU's format, or failed.

    Attributes:
        reason: Which of them: "image", "restore" or "page-server".
    """

    reason: CriuReason

    def __init__(self, reason: CriuReason, text: str) -> None:
        """Store the reason and the text."""
        super().__init__(reason, text)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class SnapshotFormatError(UffdError, ValueError):
    """The files of a snapshot are not what they should be: truncated, changed, or incomplete.

    Attributes:
        path: The file.
        offset: Where in it, in bytes, or None.
    """

    path: str
    offset: int | None

    def __init__(self, path: str, text: str, offset: int | None = None) -> None:
        """Store the place and the text."""
        super().__init__(path, text, offset)
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        place = "" if self.offset is None else f", offset {self.offset:#x}"
        return f"{self.path}{place}: {self.args[1]}"


class EventsBusyError(UffdError, RuntimeError):
    """A waiting task or a Handler reads the events of this userfaultfd already."""


_BY_ERRNO: dict[int, type[UffdOSError]] = {
    errno.EPERM: UffdPermissionError,
    errno.EACCES: UffdPermissionError,
    errno.EBUSY: RangeBusyError,
    errno.EEXIST: PageExistsError,
    errno.EAGAIN: PartialResolveError,
    errno.ENOENT: LayoutChangedError,
    errno.ESRCH: ProcessGoneError,
}


def raise_errno(
    op: str,
    code: int,
    start: int | None = None,
    length: int | None = None,
    *,
    hint: str = "",
    **data: Any,
) -> NoReturn:
    """Raise the exception for the positive errno `code` of operation `op`."""
    hint = hint or limit_met(code)
    cls = _BY_ERRNO.get(code, UffdOSError)
    if cls is PartialResolveError:
        data.setdefault("completed", 0)
    raise cls(code, op, start, length, hint, **data)


# These say that something is short here, and nothing about what was asked for.
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def raise_if_short(op: str, error: OSError) -> None:
    """Raise if a call failed for lack of descriptors or memory, and not because of its arguments.

    Code that takes a failed open(2) for "it has ended" or "nobody may see it" calls it first.
    """
    if error.errno in _SHORT:
        raise_errno(op, error.errno)


# errno: (the limit, what it counts, the option of ulimit)
_LIMITS = {
    errno.EMFILE: ("RLIMIT_NOFILE", "descriptors of a process", "-n"),
    errno.EFBIG: ("RLIMIT_FSIZE", "bytes of a file or memfd", "-f"),
}


# Of a limit of memory that is met when so much more would not fit: the least that is asked for at
# once, as for the stack of a thread.
NEARLY = 256 << 10
# The limit, the field of /proc/self/status, what it counts, the option of ulimit.
_OF_MEMORY = (
    ("RLIMIT_AS", "VmSize", "mapped", "-v"),
    ("RLIMIT_DATA", "VmData", "used", "-d"),
)


def memory_limits(length: int, pid: int = 0) -> Iterator[str]:
    """Yield the limits of a process (0: this one) that `length` more bytes of memory exceed.

    Where there is not even memory to look at what is used, each limit that is set may be it.
    """
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, MemoryError), open(f"/proc/{pid or 'self'}/status") as lines:
        known = dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)
    for name, field, what, option in _OF_MEMORY:
        soft, _ = resource.prlimit(pid, getattr(resource, name))
        if soft == resource.RLIM_INFINITY:
            continue
        text, used = "", int(known[field].split()[0]) << 10 if field in known else soft
        if field in known:
            text = f", and {human_size(used)} are {what}"
        if used + length > soft:
            yield f"{name} is {human_size(soft)}{text}: raise it (`ulimit {option}`)"


def limit_met(code: int) -> str:
    """Return the limit that a system call met, if the errno alone tells it; else ""."""
    if code == errno.ENOMEM:
        return next(memory_limits(NEARLY), "")
    if code == errno.ENFILE:
        return "the system has as many open files as fs.file-max allows: raise it (sysctl)"
    if code not in _LIMITS:
        return ""
    name, what, option = _LIMITS[code]
    soft, hard = resource.getrlimit(getattr(resource, name))
    # No limit of the process: the file system's own was met.
    if soft == resource.RLIM_INFINITY:
        return ""
    both = " and its hard limit are" if soft == hard else " is"
    return f"{name}{both} {soft} ({what}): raise it (`ulimit {option}`)"
