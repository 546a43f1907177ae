"""The exceptions (layer L1), and `raise_errno`, the one way from an errno to one of them.

Each class is also the builtin that Python picks for the errno (PEP 3151), so that
`except FileExistsError` keeps working; `errno` is set, the rest are attributes, and all pickle.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Literal, NoReturn, Self


class UffdError(Exception):
    """Root of everything pyuffd raises on purpose, apart from ValueError for bad arguments."""


class UffdOSError(UffdError, OSError):
    """A system call failed.

    Attributes: `op`, the operation in the manual's words; `start` and `length`, the range in
    bytes, or None; the data of the subclass; `hint`, what would make it work, or "".
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
    """EPERM or EACCES: opening, or EVENT_FORK without CAP_SYS_PTRACE; `hint` names the knob."""


class UnsupportedFeatureError(UffdOSError):
    """This kernel does not have what was asked: `requested`, `supported`, `missing` as masks."""

    requested: int
    supported: int
    missing: int


class RangeBusyError(UffdOSError):
    """EBUSY: the range is registered with another userfaultfd, or a page cannot be moved now."""


class PageExistsError(UffdOSError, FileExistsError):
    """EEXIST: the page is already there.  A waiter may still sleep: wake it, and it is done."""


class PartialResolveError(UffdOSError, BlockingIOError):
    """EAGAIN: only `completed` bytes were done, or the layout is changing; retry the rest."""

    completed: int


class LayoutChangedError(UffdOSError, FileNotFoundError):
    """ENOENT: the range is gone, has moved, or is not registered for this."""


class ProcessGoneError(UffdOSError, ProcessLookupError):
    """ESRCH (ENOSPC before Linux 4.13): the owner's address space is gone; drop the work."""


class PagePoisonedError(UffdOSError):
    """EHWPOISON: a page was touched whose content is lost; direct access to it raises SIGBUS.

    Attributes: `start` and `length`, the page; `address`, the byte that was touched; `offset`,
    where the page is in its region, or None. What a handler knows of the reason is the cause.
    """

    address: int
    offset: int | None


class ClosedError(UffdError, ValueError):
    """The object was closed, or belongs to the process this one was forked from."""


class HandlerError(UffdError, RuntimeError):
    """A handler or its page source failed; `start` and `length` name the pages, if known."""

    start: int | None
    length: int | None

    def __init__(self, text: str, start: int | None = None, length: int | None = None) -> None:
        """Keep the range that could not be resolved beside the text."""
        super().__init__(text, start, length)
        self.start = start
        self.length = length

    def __str__(self) -> str:
        return str(self.args[0])


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
    """Handing a userfaultfd over failed; nothing that was received is left open.

    Attributes: `reason`, what for, one word of `HandoverReason`; `pid` and `uid`, the peer as
    the kernel names it, or None.
    """

    reason: HandoverReason
    pid: int | None
    uid: int | None

    def __init__(
        self, reason: HandoverReason, text: str, pid: int | None = None, uid: int | None = None
    ) -> None:
        """Keep the reason and the peer beside the text."""
        super().__init__(reason, text, pid, uid)
        self.reason = reason
        self.pid = pid
        self.uid = uid

    def __str__(self) -> str:
        peer = "" if self.pid is None else f" (peer: pid {self.pid}, uid {self.uid})"
        return f"{self.args[1]}{peer}"


class EventsBusyError(UffdError, RuntimeError):
    """The events of this userfaultfd are another one's: a waiting task's, or a Handler's."""


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
    """Raise the exception that stands for `code`, a positive errno, of operation `op`."""
    hint = hint or limit_met(code)
    cls = _BY_ERRNO.get(code, UffdOSError)
    if cls is PartialResolveError:
        data.setdefault("completed", 0)
    raise cls(code, op, start, length, hint, **data)


# errno: the limit, what it counts, the option of ulimit
_LIMITS = {
    errno.EMFILE: ("RLIMIT_NOFILE", "descriptors of one process", "-n"),
    errno.EFBIG: ("RLIMIT_FSIZE", "bytes of a file, memfds too", "-f"),
}


def limit_met(code: int) -> str:
    """Return which limit a system call met, where the errno alone says that; else ""."""
    if code == errno.ENFILE:
        return "the system has as many open files as fs.file-max allows: raise it (sysctl)"
    if code not in _LIMITS:
        return ""
    name, what, option = _LIMITS[code]
    try:
        import resource
    except (ImportError, OSError):  # for want of a descriptor, it may be
        return f"{name} ({what}): raise it (`ulimit {option}`)"
    soft, hard = resource.getrlimit(getattr(resource, name))
    # A file system has a limit of its own.
    if soft == resource.RLIM_INFINITY:
        return ""
    both = " and its hard limit are" if soft == hard else " is"
    return f"{name}{both} {soft} ({what}): raise it (`ulimit {option}`)"
