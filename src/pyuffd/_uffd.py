"""`Userfaultfd`: one descriptor, its ioctls and its events (layer L2).

Nothing here resolves faults without being called; `pyuffd.Handler` does.
"""

from __future__ import annotations

import errno
import mmap
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyuffd import _fork_writes, _memory, lowlevel
from pyuffd._abi import (
    USER_MODE_ONLY,
    ContinueMode,
    CopyMode,
    EventCode,
    Feature,
    Ioctl,
    MoveMode,
    PoisonMode,
    RegisterMode,
    RwprotectMode,
    WriteprotectMode,
    ZeropageMode,
)
from pyuffd._arguments import (
    FD_LIMIT,
    check_buffer,
    check_flags,
    check_int,
    check_pid,
    check_seconds,
)
from pyuffd._closing import CloseCallbacks
from pyuffd._errors import (
    ClosedError,
    LayoutChangedError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._event_claims import EventClaims, Owner
from pyuffd._events import MESSAGE_SIZE, Event, Fork, fork_fd, message_code, parse_event
from pyuffd._left import LeftBehind, Number, check_target, tidy
from pyuffd._opening import negotiated, open_uffd, probe_api
from pyuffd._owned import Descriptor
from pyuffd._pages import (
    PAGE_SIZE,
    RangeLike,
    check_range,
    is_address,
    page_size_of,
    resolve_range,
    start_of,
)
from pyuffd._range_modes import RangeModes, is_subset
from pyuffd._watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from typing_extensions import Buffer

# EAGAIN ends once the thread that changes the layout has run again: 12 ms on a busy machine.
FILL_RETRY_S = 1.0
MAP_NORESERVE = 0x4000  # not in the mmap module
ZEROS_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
READ_MOST = 1 << 16  # messages at once; 2 MiB are zeroed for them
READ_BATCH = 64  # messages per read(2), 2 KiB


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of a `fill_*` call, in bytes.

    `done` bytes were filled by this call. `already_present` bytes were present before; the threads
    that waited for them were woken. `deferred` bytes could not be filled because the layout kept
    changing: fill the range again later.
    """

    done: int
    already_present: int
    deferred: int


class Userfaultfd(CloseCallbacks):
    """Open a userfaultfd for this process, or adopt one with `from_fd`.

    Args:
        features: Feature bits to enable. Every one must be supported, or nothing is opened.
        user_mode_only: Deliver faults of user code only. Works without privilege; system calls
            that touch a missing page then fail with EFAULT instead of waiting for it.
        nonblocking: Open with O_NONBLOCK. A blocking userfaultfd cannot be polled (POLLERR).

    Attributes:
        features: The enabled features.
        supported: The features that this kernel supports.
        ioctls: The ioctls of the descriptor itself.
        adopted: Whether it was received from a process, with `from_fd` or as a fork's descriptor.
            It may then govern another process's memory.
        owner_pid: The process whose memory it governs; None if that is unknown. It can be set on
            an adopted userfaultfd, for a sender that is not the owner.

    Raises:
        UnsupportedFeatureError: a feature that this kernel does not support.
        UffdPermissionError: EPERM or EACCES - the system call and the device both refused; `hint`
            names the settings that allow it. EPERM - EVENT_FORK without CAP_SYS_PTRACE.

    Kernel: userfaultfd(2), UFFDIO_API(2const). One descriptor can do one handshake, so a first
        descriptor asks what is supported and is closed; a second one enables `features`.
    GIL: released in every call.  Threads: safe, apart from close().  Blocks: see each method.

    Example:
        >>> from pyuffd import Feature, Userfaultfd
        >>> with Userfaultfd(features=Feature.THREAD_ID) as uffd:
        ...     uffd.features == Feature.THREAD_ID
        True
    """

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
            ValueError: not a userfaultfd, the handshake has not been done, or an `owner_pid`
                below 1.

        Kernel: the features are read from /proc/self/fdinfo. O_NONBLOCK and FD_CLOEXEC are set,
            since a received descriptor has the flags that its sender gave it.
        """
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
        check_int("fd", fd, 0, FD_LIMIT)
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
        self._claims = EventClaims()
        self._watch = Watch()
        tidy()
        self._number = Number(descriptor)  # last: a signal handler may raise at any line above

    # The descriptor

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
        """
        fd = self.fileno()
        self._run_before_close()
        self._watch.end()
        self._claims.drop()
        if self._number.is_free:
            return self._number.descriptor.release()
        copy = Descriptor.duplicate(fd)
        self._number.close()
        return copy.release()

    def _hold_open(self) -> None:
        """Keep the descriptor open after close(), until `_let_close`; for a handler that stops."""
        self._number.hold()

    def _let_close(self) -> None:
        """Undo a `_hold_open`."""
        self._number.release()

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
        self._claims.drop()
        if self._pid == os.getpid():
            self._watch.end()
            self._number.close()
        else:
            self._number.descriptor.close()

    def __del__(self) -> None:
        if hasattr(self, "_number") and not self.closed and self._pid == os.getpid():
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._number.fd}"
        return f"<Userfaultfd {state} features={self.features!r}>"

    # Ranges

    def register(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: RegisterMode = RegisterMode.MISSING,
        granted: lowlevel.Granted | None = None,
    ) -> Ioctl:
        """Register a range and return the ioctls that it supports.

        Registering again with other modes replaces the modes; a subset of the current modes changes
        nothing. If a range would lose WP it is unprotected first: on hugetlb memory a write to a
        page left protected never returns (measured on Linux 6.18). This covers ranges that this
        object registered. Ranges that the sender of an adopted descriptor registered you must
        unprotect yourself.

        Args:
            range_or_start: A range object, or the address, aligned to the page size.
            length: Bytes, a multiple of the page size; not with a range object.
            mode: Which faults to deliver.
            granted: Receives the ioctls too, even if this call is interrupted; for handlers.

        Raises:
            ValueError: a bad range, or no mode.
            UffdOSError: EINVAL - unmapped, or memory that cannot be registered in this mode.
            RangeBusyError: EBUSY - registered with another userfaultfd, or a thread that a
                handler left behind may still write to the range (see `Handler.stop`).

        Kernel: UFFDIO_REGISTER(2const).  Blocks: no.
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, RegisterMode)
        if not mode:
            raise ValueError("register needs at least one mode")
        fd = self.fileno()
        check_target(start, length, self._memory_key)
        owner = self._claims.owner
        if owner is not None:
            # A handler's own call, which has `granted`, has looked at that already.
            served = owner._served_mode(self, start, length) if granted is None else None
            if served is not None and not is_subset(mode, served):
                raise self._served_by(owner, "register", start, length, "serve it again")
            owner._registers(self, start, length)
        if not mode & RegisterMode.WP:
            for first, end, old in self._registered.overlapping(start, start + length):
                if old & RegisterMode.WP and not is_subset(mode, old):
                    # ENOENT: the registered memory has been unmapped since.
                    with suppress(LayoutChangedError):
                        lowlevel.writeprotect(fd, first, end - first, 0)
        try:
            ioctls = Ioctl(lowlevel.register(fd, start, length, mode, granted))
        except UffdOSError as error:
            raise self._explained(error, start, length, mode) from None
        self._registered.set(start, start + length, mode)
        self._update_watch()
        if mode & RegisterMode.WP:
            _fork_writes.track(self)
        return ioctls

    def unregister(self, range_or_start: RangeLike | int, length: int | None = None) -> None:
        """Unregister a range: protection is lifted, and threads that wait continue.

        A page that is still missing reads as zeros from then on, so resolve or poison it first.

        Kernel: UFFDIO_UNREGISTER(2const), and UFFDIO_WAKE: by itself it leaves threads asleep that
        wait for a WP or MINOR fault, unless the range is registered for MISSING too (measured on
        Linux 6.18).  Blocks: no.
        """
        start, length = _checked(range_or_start, length)
        fd = self.fileno()
        self._refuse_served("unregister", start, length, "use handler.unserve()")
        try:
            lowlevel.unregister(fd, start, length)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None
        # Linux wakes only those that wait for a missing page.
        with suppress(UffdOSError):
            lowlevel.wake(fd, start, length)
        self._note_unregistered(start, length)
        owner = self._claims.owner
        if owner is not None:
            owner._unregistered(self, start, length)

    def _refuse_served(self, what: str, start: int, length: int, instead: str) -> None:
        """Raise ValueError if a handler serves memory in the range."""
        owner = self._claims.owner
        if owner is not None and owner._served_mode(self, start, length) is not None:
            raise self._served_by(owner, what, start, length, instead)

    def _served_by(
        self, owner: Owner, what: str, start: int, length: int, instead: str
    ) -> ValueError:
        return ValueError(
            f"{what} [{start:#x}, +{length:#x}): {owner!r} serves memory there and would not know"
            f" of this call: {instead}"
        )

    def _registered_ranges(self) -> list[tuple[int, int]]:
        """Return start and length of each range that this object has registered."""
        if not self._registered:
            return []
        return [(a, b - a) for a, b, _ in self._registered.overlapping(*self._registered.span)]

    def _registered_for(self, mode: RegisterMode) -> list[tuple[int, int]]:
        """Return start and end of each range that this object has registered for a mode."""
        if not self._registered:
            return []
        rows = self._registered.overlapping(*self._registered.span)
        return [(start, end) for start, end, modes in rows if modes & mode]

    def _has_registered(self, start: int, end: int) -> bool:
        """Whether this object registered anything in [start, end)."""
        return bool(self._registered.overlapping(start, end))

    def _note_unregistered(self, start: int, length: int) -> None:
        """Note that a range was unregistered by other means than `unregister`."""
        self._registered.clear(start, start + length)
        if not self._registered:
            self._watch.end()

    def wake(self, range_or_start: RangeLike | int, length: int | None = None) -> None:
        """Let every thread that waits in the range try its access again.

        Kernel: UFFDIO_WAKE(2const). A thread that finds its page still missing faults again.
        """
        start, length = _checked(range_or_start, length)
        lowlevel.wake(self.fileno(), start, length)

    # One ioctl each

    def copy(
        self,
        dst: int,
        src: int | Buffer,
        length: int | None = None,
        *,
        mode: CopyMode = CopyMode(0),  # noqa: B008
    ) -> int:
        """Fill missing pages with a copy; return the bytes copied.

        Args:
            dst: Address in the owner's memory, aligned to the page size.
            src: Address in this process (any alignment), or a buffer.
            length: Bytes; the buffer's size by default.
            mode: CopyMode.DONTWAKE, CopyMode.WP.

        Raises:
            ValueError: a bad range, or a buffer shorter than `length`.
            PartialResolveError: EAGAIN - `completed` bytes were copied before something stopped
                it, or 0 while a layout event is unread.
            PageExistsError: EEXIST - the first page is present; waiters are not woken.
            LayoutChangedError: ENOENT - not registered, or across two mappings.
            ProcessGoneError: ESRCH - the owner has exited.
            UffdOSError: EFAULT - the source cannot be read.

        Kernel: UFFDIO_COPY(2const).  Blocks: while a source page is itself being faulted in.
        """
        address, length, owner = _source(src, length)
        check_range(dst, length, name="dst")
        check_flags("mode", mode, CopyMode)
        try:
            done = lowlevel.copy(self.fileno(), dst, address, length, mode)
        except UffdOSError as error:
            raise self._explained(error, dst, length, mode, address) from None
        del owner
        return done

    def zeropage(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ZeropageMode = ZeropageMode(0),  # noqa: B008
    ) -> int:
        """Fill missing pages with zeros; return the bytes filled.

        Hugetlb ranges do not support it (EINVAL): copy zeros instead. Errors as for `copy`.

        Kernel: UFFDIO_ZEROPAGE(2const).
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, ZeropageMode)
        try:
            return lowlevel.zeropage(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    def move(
        self,
        dst: int,
        src: int,
        length: int,
        *,
        mode: MoveMode = MoveMode(0),  # noqa: B008
    ) -> int:
        """Move anonymous pages of the owner from `src` to missing pages at `dst`; return bytes.

        Raises:
            LayoutChangedError: ENOENT - a source page is missing (see MoveMode.ALLOW_SRC_HOLES).
            PageExistsError: EEXIST - a destination page is present.
            RangeBusyError: EBUSY - a source page is or was shared by fork: MADV_DONTFORK it.
            PartialResolveError: EAGAIN - `completed` bytes were moved.

        Kernel: UFFDIO_MOVE(2const); needs Feature.MOVE; anonymous memory; Linux 6.8.
        """
        check_range(dst, length, name="dst")
        _check_move(dst, src, length)
        check_flags("mode", mode, MoveMode)
        try:
            return lowlevel.move(self.fileno(), dst, src, length, mode)
        except UffdOSError as error:
            raise self._explained(error, dst, length, mode, src) from None

    def continue_(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ContinueMode = ContinueMode(0),  # noqa: B008
    ) -> int:
        """Map pages that the page cache already holds; return the bytes mapped.

        Raises:
            PageExistsError: EEXIST - already mapped; waiters are not woken.
            UffdOSError: EFAULT - the page cache has no such page.
            PartialResolveError: EAGAIN - `completed` bytes were mapped.

        Kernel: UFFDIO_CONTINUE(2const); shmem and hugetlb registered with RegisterMode.MINOR.
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, ContinueMode)
        try:
            return lowlevel.continue_(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length, mode) from None

    def poison(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: PoisonMode = PoisonMode(0),  # noqa: B008
    ) -> int:
        """Mark missing pages so that an access raises SIGBUS; return the bytes marked.

        The marks outlive unregistering. MADV_DONTNEED removes them, and `copy` replaces them.

        Raises:
            PageExistsError: EEXIST - a page is present.
            PartialResolveError: EAGAIN - `completed` bytes were marked.

        Kernel: UFFDIO_POISON(2const); needs Feature.POISON; Linux 6.6.
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, PoisonMode)
        try:
            return lowlevel.poison(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    def writeprotect(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: WriteprotectMode = WriteprotectMode.WP,
    ) -> None:
        """Write-protect a range, or with mode 0 unprotect it and wake the threads that wait.

        Missing pages of anonymous memory are protected only with Feature.WP_UNPOPULATED. Without
        it the call succeeds, but the first write to such a page causes no write-protect fault.

        Raises:
            ValueError: a bad range, or WP together with DONTWAKE.
            LayoutChangedError: ENOENT - part of the range is not registered with RegisterMode.WP;
                the mappings before that part have been changed.
            PartialResolveError: EAGAIN - a layout event is unread.

        Kernel: UFFDIO_WRITEPROTECT(2const).
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, WriteprotectMode)
        if mode == WriteprotectMode.WP | WriteprotectMode.DONTWAKE:
            raise ValueError("DONTWAKE can only be used when removing protection, not with WP")
        fd = self.fileno()
        self._refuse_served(
            "writeprotect",
            start,
            length,
            "use handler.writeprotect(), and handler.unprotect() to lift it",
        )
        try:
            lowlevel.writeprotect(fd, start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    def rwprotect(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: RwprotectMode = RwprotectMode.RWP,
    ) -> None:
        """Protect a range against reads and writes, or with mode 0 unprotect it and wake.

        Kernel: UFFDIO_RWPROTECT; needs Feature.RWP and RegisterMode.RWP; Linux 7.3.
        """
        start, length = _checked(range_or_start, length)
        check_flags("mode", mode, RwprotectMode)
        fd = self.fileno()
        self._refuse_served("rwprotect", start, length, "handlers know no such faults")
        lowlevel.rwprotect(fd, start, length, mode)

    def set_mode(
        self,
        *,
        enable: Feature = Feature(0),  # noqa: B008
        disable: Feature = Feature(0),  # noqa: B008
    ) -> None:
        """Enable or disable features of the open descriptor; Linux allows Feature.RWP_ASYNC only.

        Kernel: UFFDIO_SET_MODE; Linux 7.3.
        """
        check_flags("enable", enable, Feature)
        check_flags("disable", disable, Feature)
        if enable & disable:
            raise ValueError(f"{Feature(enable & disable)!r} is both enabled and disabled")
        self.fileno()
        if self._claims.is_owned:
            raise ValueError(
                f"set_mode: {self._claims.owner!r} was made for the features {self.features!r}:"
                " stop it first"
            )
        lowlevel.set_mode(self.fileno(), enable, disable)
        self.features = Feature((self.features | enable) & ~int(disable))

    # Filling, correct by default

    def fill_copy(
        self,
        dst: RangeLike | int,
        src: int | Buffer,
        length: int | None = None,
        *,
        mode: CopyMode = CopyMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Fill every missing page of a range with a copy, and wake the threads that wait for them.

        Pages that are present are skipped. EAGAIN is retried while the layout changes.

        Args:
            dst: A range object, which has a page size, or an address in memory of 4 KiB pages.
            src: Address in this process, or a buffer, of at least the range's length.
            length: Bytes; by default the range's length, or the buffer's.
            mode: As for `copy`.
            retry_s: How long to retry EAGAIN without progress, in seconds. What could not be filled
                by then is `deferred`.

        Raises:
            ValueError: a bad range, or a source that is too short.
            LayoutChangedError: ENOENT - not registered, unmapped, or across two mappings.
            ProcessGoneError: ESRCH - the owner has exited.
            UffdOSError: EFAULT - the source cannot be read; `start` is the page, and `completed`
                bytes were filled before it.

        Kernel: UFFDIO_COPY(2const), UFFDIO_WAKE(2const).  Blocks: up to `retry_s` at a time.
        """
        check_flags("mode", mode, CopyMode)
        start = start_of(dst, "dst")
        most = None if is_address(dst) else resolve_range(dst, None)[1]
        if most is not None:
            length = most if length is None else check_int("length", length)
            if length > most:
                raise ValueError(f"length {length:#x} is more than the range's {most:#x}")
        address, length, owner = _source(src, length)
        result = self._fill(
            lowlevel.FillOp.COPY, start, address, length, mode, page_size_of(dst), retry_s
        )
        del owner
        return result

    def fill_zero(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Fill every missing page of a range with zeros; on hugetlb memory, copy zeros.

        Errors as for `fill_copy`.
        """
        start, size = resolve_range(range_or_start, length)
        page_size = page_size_of(range_or_start)
        if page_size == PAGE_SIZE:
            return self._fill(lowlevel.FillOp.ZEROPAGE, start, 0, size, 0, page_size, retry_s)
        check_range(start, size, page_size)
        zeros = _memory.mmap(size, mmap.PROT_READ, ZEROS_FLAGS)
        try:
            return self._fill(lowlevel.FillOp.COPY, start, zeros, size, 0, page_size, retry_s)
        finally:
            _memory.munmap(zeros, size)

    def fill_continue(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ContinueMode = ContinueMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Map every page of a range from the page cache; as `fill_copy` otherwise.

        Raises:
            UffdOSError: EFAULT - the page cache lacks the page at `start`.
        """
        start, size = resolve_range(range_or_start, length)
        check_flags("mode", mode, ContinueMode)
        page_size = page_size_of(range_or_start)
        return self._fill(lowlevel.FillOp.CONTINUE, start, 0, size, mode, page_size, retry_s)

    def fill_poison(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: PoisonMode = PoisonMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Poison every missing page of a range; as `fill_copy` otherwise."""
        start, size = resolve_range(range_or_start, length)
        check_flags("mode", mode, PoisonMode)
        page_size = page_size_of(range_or_start)
        return self._fill(lowlevel.FillOp.POISON, start, 0, size, mode, page_size, retry_s)

    def fill_move(
        self,
        dst: RangeLike | int,
        src: int,
        length: int | None = None,
        *,
        mode: MoveMode = MoveMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Move the owner's pages to every missing page of a range; as `fill_copy` otherwise.

        If a destination page is present, its source page stays where it is.
        """
        start, size = resolve_range(dst, length, name="dst")
        check_flags("mode", mode, MoveMode)
        page_size = page_size_of(dst)
        check_range(start, size, page_size, name="dst")
        _check_move(start, src, size)
        return self._fill(lowlevel.FillOp.MOVE, start, src, size, mode, page_size, retry_s)

    def _fill(
        self,
        op: lowlevel.FillOp,
        start: int,
        src: int,
        length: int,
        mode: int,
        page_size: int,
        retry_s: float,
    ) -> FillResult:
        check_range(start, length, page_size, name="dst")
        limit_ns = int(check_seconds("retry_s", retry_s) * 1e9)
        try:
            return FillResult(
                *lowlevel.fill(op, self.fileno(), start, src, length, mode, page_size, limit_ns)
            )
        except UffdOSError as error:
            raise self._explained(error, start, length, mode, src) from None

    def _explained(
        self, error: UffdOSError, start: int, length: int, mode: int = 0, src: int = 0
    ) -> UffdOSError:
        """Return the error with its cause as a hint, if the memory can be inspected."""
        from pyuffd import _diagnose  # rarely needed

        pid = getattr(self, "owner_pid", None if self.adopted else self._pid)
        own = tuple((a, b) for a, b, _ in self._registered.overlapping(start, start + length))
        asked = _diagnose.Asked(error.op, start, length, pid, int(mode), src, self.features, own)
        return _diagnose.explained(error, asked)

    # Events

    def _claim_events(self, owner: Owner) -> None:
        """Reserve the events for `owner` until it is gone or releases them; for handlers.

        Raises:
            ValueError: another owner has them.
            EventsBusyError: a task waits for them.
        """
        self._claims.claim(self, owner)
        self._update_watch()

    def _release_events(self, owner: Owner) -> None:
        """Undo a `_claim_events`; does nothing if the events belong to another owner."""
        if self._claims.owner not in (owner, None):
            return
        self._claims.release(owner)
        self._watch.is_answered = False
        self._update_watch()

    def note_answered(self) -> None:
        """Note that the owner of the events runs, until `_release_events`."""
        self._watch.is_answered = True
        self._watch.end()

    def note_sent(self, pid: int) -> None:
        """Note that a process (0: unknown) was sent the descriptor and may read the events."""
        self._watch.note_sent(pid)
        self._update_watch()

    def _update_watch(self) -> None:
        if not self.closed and self._pid == os.getpid():
            self._watch.update(
                self.fileno(),
                self._registered.span if self._registered else None,
                owner_pid=self.owner_pid,
                by_handler=self._claims.is_owned,
                has_forks=bool(self.features & Feature.EVENT_FORK),
            )

    def read_events(self, max_events: int = READ_BATCH) -> list[Event]:
        """Return the queued events, at most `max_events`, in the kernel's order.

        The kernel returns page faults before older layout events (measured). So read until the list
        is empty, and apply Remove, Unmap, Remap and Fork before resolving faults. The caller must
        close the userfaultfds of Fork events.

        Raises:
            EventsBusyError: a Handler of this userfaultfd has not stopped; it reads the events.

        Blocks: never, unless opened with `nonblocking=False`.
        """
        max_events = check_int("max_events", max_events)
        if max_events < 1:
            raise ValueError(f"max_events {max_events} must be above zero")
        max_events = min(max_events, READ_MOST)
        fd = self.fileno()
        self._claims.check(self)
        unread = self._claims.unread
        if unread:
            return [unread.popleft() for _ in range(min(max_events, len(unread)))]
        raw = lowlevel.read(fd, max_events * MESSAGE_SIZE)
        return [self._event(raw[at : at + MESSAGE_SIZE]) for at in range(0, len(raw), MESSAGE_SIZE)]

    def events(self) -> AsyncIterator[Event]:
        """Return the events for `async for`, in the running asyncio loop, until close().

        Everything queued is read at once. Layout events are delivered before the page faults read
        with them, so that events can be handled one by one. A task that is cancelled or leaves the
        `async for` loses no event: events that were read but not delivered come first from the next
        iterator and from read_events(). Other tasks get their turn between batches.

        Raises:
            ClosedError: closed already. Closing it later ends the iteration.
            ValueError: opened with `nonblocking=False`.
            EventsBusyError: (when iterated) another task waits for the events, or a Handler reads
                them.

        GIL: released while waiting.  Threads: one loop at a time.  Blocks: never; it awaits.

        Example:
            >>> import asyncio, mmap
            >>> from pyuffd import Feature, Region, Userfaultfd
            >>> async def first_event(uffd, region):
            ...     removing = asyncio.to_thread(region.madvise, mmap.MADV_DONTNEED)
            ...     task = asyncio.create_task(removing)
            ...     async for event in uffd.events():
            ...         await task
            ...         return event
            >>> features = Feature.EVENT_REMOVE
            >>> with Userfaultfd(features=features) as uffd, Region.anonymous(4096) as region:
            ...     _ = uffd.register(region)
            ...     event = asyncio.run(first_event(uffd, region))
            ...     event.start == region.start
            True
        """
        from pyuffd._async import EventIterator  # asyncio is 40 ms of import

        return EventIterator(self)

    def _event(self, raw: bytes) -> Event:
        if message_code(raw) == EventCode.FORK:
            descriptor = Descriptor()
            return descriptor.adopt(fork_fd(raw), Fork(self._forked(descriptor, fork_fd(raw))))
        return parse_event(raw)

    def _forked(self, descriptor: Descriptor, fd: int) -> Self:
        """Return a child's userfaultfd, with the features and registrations of this one."""
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        child = type(self).__new__(type(self))
        child.supported = self.supported
        child._adopt(descriptor, self.features, self.ioctls, adopted=True)
        child._registered = self._registered.copy()
        return child


def _checked(range_or_start: RangeLike | int, length: int | None) -> tuple[int, int]:
    start, size = resolve_range(range_or_start, length)
    check_range(start, size, page_size_of(range_or_start))
    return start, size


def _check_move(dst: int, src: int, length: int) -> None:
    check_range(src, length, name="src")
    if src < dst + length and dst < src + length:
        raise ValueError(f"src {src:#x} and dst {dst:#x} overlap within {length:#x} bytes")


def _source(src: int | Buffer, length: int | None) -> tuple[int, int, object]:
    """Return (address, length, object that must stay alive during the copy) of a source."""
    if isinstance(src, int):
        if length is None:
            raise ValueError(f"source address {src:#x} needs a length")
        check_int("length", length)
        if src < 0 or src + length > 1 << 64:
            raise ValueError(f"src {src:#x} + {length:#x} is not in the address space")
        return src, length, None
    check_buffer("src", src)
    address, size, owner = _memory.buffer_address(src)
    length = size if length is None else check_int("length", length)
    if length > size:
        raise ValueError(f"length {length:#x} is more than the {size:#x} bytes of src")
    return address, length, owner
