"""`UffdDescriptor`: what `Userfaultfd` does with its descriptor: open, adopt, close (layer L2)."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from collections.abc import Hashable
from typing import Self

from pyuffd import _diagnose, lowlevel
from pyuffd._abi import USER_MODE_ONLY, Feature, Ioctl
from pyuffd._arguments import check_bools, check_fd, check_flags, check_pid
from pyuffd._closing import CloseCallbacks, alive
from pyuffd._errors import (
    ClosedError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._left import LeftBehind, Number, tidy
from pyuffd._opening import negotiated, open_uffd, probe_api
from pyuffd._owned import Descriptor
from pyuffd._range_modes import RangeModes

_made: weakref.WeakSet[UffdDescriptor] = weakref.WeakSet()


def _refuse_owned(fd: int) -> None:
    """Raise ValueError for the descriptor of an object: a second owner would close it too."""
    for one in alive(_made):
        number = getattr(one, "_number", None)
        if number is not None and number.fd == fd and one._pid == os.getpid():
            raise ValueError(f"fd {fd} is that of {one!r}: use that object, or adopt os.dup({fd})")


class UffdDescriptor(CloseCallbacks):
    """The descriptor of a `Userfaultfd`, which documents the arguments and attributes."""

    features: Feature
    supported: Feature
    ioctls: Ioctl

    _failed = "closing the userfaultfd failed"
    _instead = "hand the descriptor to another process with send_uffd(), or duplicate its number"

    def __init__(
        self,
        *,
        features: Feature = Feature(0),  # noqa: B008 - an immutable flag
        user_mode_only: bool = False,
        nonblocking: bool = True,
    ) -> None:
        check_flags("features", features, Feature)
        check_bools(user_mode_only=user_mode_only, nonblocking=nonblocking)
        flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
        if user_mode_only:
            flags |= USER_MODE_ONLY
        self.supported, _ = probe_api(flags)
        missing = Feature(int(features) & ~int(self.supported))  # ~flag would drop unknown bits
        if missing:
            raise UnsupportedFeatureError(
                errno.EINVAL,
                "UFFDIO_API",
                hint=f"this kernel does not have {missing!r}",
                requested=int(features),
                supported=int(self.supported),
                missing=int(missing),
            )
        with open_uffd(flags) as descriptor:
            try:
                _, ioctls = lowlevel.api(descriptor.number, features)
            except UffdPermissionError as error:
                hint = "EVENT_FORK needs CAP_SYS_PTRACE"
                code = error.errno or errno.EPERM
                raise UffdPermissionError(
                    code, "UFFDIO_API", hint=hint, requested=int(features)
                ) from None
            self._adopt(descriptor.moved(), features, Ioctl(ioctls), adopted=False)

    @classmethod
    def from_fd(cls, fd: int, *, owner_pid: int | None = None) -> Self:
        """Adopt a userfaultfd that another process opened; the object owns it from then on.

        Args:
            fd: The descriptor. Its sender has done the handshake. It is closed with this object;
                if this call raises, it stays the caller's.
            owner_pid: The process whose memory it governs: the process that opened it, which may
                differ from the one that sent it. None if it is unknown; calls that need to know it
                then raise.

        Raises:
            ValueError: not a userfaultfd, one that another object of this process owns already,
                the handshake has not been done, or an `owner_pid` below 1.

        Kernel: the features are read from /proc/self/fdinfo. O_NONBLOCK and FD_CLOEXEC are set,
            since a received descriptor has the flags that its sender gave it.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_pid("owner_pid", owner_pid)
        _refuse_owned(check_fd("fd", fd))
        self = cls._prepared(fd, owner_pid)
        return self._number.descriptor.adopt(fd, self)  # last: until here it is the caller's

    @classmethod
    def _from_descriptor(cls, descriptor: Descriptor) -> Self:
        """Move a userfaultfd here from `descriptor`, which keeps it if this raises ValueError."""
        self = cls._prepared(descriptor.number, None)
        descriptor.move_to(self._number.descriptor)
        return self

    @classmethod
    def _opened_in(cls, descriptor: Descriptor, features: Feature, pid: int) -> Self:
        """Do the handshake of a userfaultfd that was opened in another process, and adopt it."""
        self = cls.__new__(cls)
        offered, ioctls = lowlevel.api(descriptor.number, features)
        self.supported = Feature(offered)
        self._adopt(descriptor.moved(), features, Ioctl(ioctls), adopted=True, owner_pid=pid)
        return self

    @classmethod
    def _prepared(cls, fd: int, owner_pid: int | None) -> Self:
        """Return an object for the userfaultfd `fd`, which it does not own yet."""
        check_fd("fd", fd)
        check_pid("owner_pid", owner_pid)
        features, ioctls = negotiated(fd)
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        self = cls.__new__(cls)
        try:
            # Ask a new descriptor, which needs no privilege: fdinfo adds the ioctls of ranges.
            self.supported, ioctls = probe_api(os.O_CLOEXEC | USER_MODE_ONLY)
        except UffdOSError:
            self.supported = features
        self._adopt(Descriptor(), features, ioctls, adopted=True, owner_pid=owner_pid)
        return self

    def _adopt(
        self,
        descriptor: Descriptor,
        features: Feature,
        ioctls: Ioctl,
        *,
        adopted: bool,
        owner_pid: int | None = None,
    ) -> None:
        self.adopted = adopted
        self._owner_pid = owner_pid if adopted else os.getpid()
        self.features = features
        self.ioctls = ioctls
        self._pid = os.getpid()
        self._registered = RangeModes()
        self._before_close = []
        self._begin()
        tidy()
        _made.add(self)
        self._number = Number(descriptor)  # last: a signal handler may raise at any line above

    # The descriptor

    def _check_usable(self) -> None:
        self.fileno()

    def fileno(self) -> int:
        """Return the file descriptor.

        Raises:
            ClosedError: closed, detached, or called in a fork of the process that made the object
                (the descriptor would act on the parent's memory).
        """
        fd = self._number.fd
        if fd < 0:
            raise ClosedError("this userfaultfd is closed")
        if self._pid != os.getpid():
            raise ClosedError(
                f"this userfaultfd belongs to process {self._pid}, not to its fork {os.getpid()}"
            )
        return fd

    @property
    def owner_pid(self) -> int | None:
        """The pid of the process whose memory it governs, or None."""
        return self._owner_pid

    @owner_pid.setter
    def owner_pid(self, pid: int | None) -> None:
        check_pid("owner_pid", pid)
        if not self.adopted and pid != self._owner_pid:
            raise ValueError(
                f"{self!r} was opened by process {self._owner_pid} and governs its memory"
            )
        self._owner_pid = pid

    @property
    def closed(self) -> bool:
        """Whether close() or detach() was called."""
        return self._number.fd < 0

    def detach(self) -> int:
        """Give up ownership and return the descriptor; the object is closed afterwards.

        The descriptor usually keeps its number. If a stopped handler left a thread behind, that
        thread may still use the number, so a duplicate with another number is returned.

        GIL: released.  Threads: one at a time, when no other thread uses the object.
        Blocks: until the handlers of this userfaultfd have stopped.
        """
        fd = self.fileno()
        self._run_before_close()
        self._let_go()
        if self._number.is_free:
            return self._number.descriptor.release()
        copy = Descriptor.duplicate(fd)
        self._number.close()
        return copy.release()

    def _hold_open(self, user: Hashable) -> None:
        """Keep the descriptor open after close(), until `_let_close`; for a handler that stops.

        `user` must not keep the handler alive: its id, or that and a word.
        """
        self._number.hold(user)

    def _let_close(self, user: Hashable) -> None:
        """Undo `_hold_open`, if it was called."""
        self._number.release(user)

    def _leave_behind(self, left: LeftBehind) -> None:
        """Note threads that may still use the descriptor's number when it is closed."""
        self._number.leave(left)

    @property
    def _memory_key(self) -> object:
        """A key for the address space that it governs: the owner's pid, if that is known."""
        return self._owner_pid or f"of {id(self)}"

    def close(self) -> None:
        """Stop the handlers that use this descriptor, then close it.

        Closing unregisters all ranges. A thread that still waits continues with a zero-filled page,
        so do not close a userfaultfd to free a stalled thread; a Handler that stops leaves none
        waiting. If stopping a handler is interrupted, the descriptor stays open and the next call
        continues.

        GIL: released.  Threads: when no other thread uses the object.
        Blocks: until the handlers of this userfaultfd have stopped.
        """
        if not self.closed and self._pid == os.getpid():
            try:
                self._run_before_close()
            except BaseException:
                if self._may_close():
                    self._end()
                raise
        self._end()

    def _end(self) -> None:
        """Close what is open; may be called again."""
        self._let_go()
        if self._pid == os.getpid():
            self._number.close()
        else:
            self._number.descriptor.close()

    def _begin(self) -> None:
        """Make what `_let_go` ends."""

    def _let_go(self) -> None:
        """End what needs the open descriptor, before it closes or is given up; may be repeated."""

    def __del__(self) -> None:
        if hasattr(self, "_number") and not self.closed and self._pid == os.getpid():
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                self._close_dropped()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._number.fd}"
        return f"<Userfaultfd {state} features={self.features!r}>"

    def _explained(
        self, error: UffdOSError, start: int, length: int, mode: int = 0, src: int = 0
    ) -> UffdOSError:
        """Return the error with its cause as a hint, if the memory can be inspected."""
        pid = getattr(self, "owner_pid", None if self.adopted else self._pid)
        own = tuple((a, b) for a, b, _ in self._registered.overlapping(start, start + length))
        asked = _diagnose.Asked(error.op, start, length, pid, int(mode), src, self.features, own)
        return _diagnose.explained(error, asked)
