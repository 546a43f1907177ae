"""The C engine as an object: converts arguments and errors, without policy (layer L4)."""

from __future__ import annotations

import errno
import logging
import math
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from pyuffd._describe import log_debug, log_error
from pyuffd._errors import HandlerError, raise_errno
from pyuffd._limits import raise_start_error
from pyuffd._shim import ffi, lib
from pyuffd.handlers._engine_calls import EngineLife, range_ref
from pyuffd.handlers._engine_pages import EnginePages
from pyuffd.handlers._engine_reports import EngineReports
from pyuffd.handlers._range_spec import Served, range_spec, range_specs
from pyuffd.handlers._sigbus import faulthandler_left
from pyuffd.handlers._types import (
    PATIENCE_S,
    DropRacedError,
    Ended,
    IfPresent,
    OnError,
    Opening,
    PagesPresentError,
    RangeId,
    RangeSpec,
    Request,
    Taken,
    lacks_error,
)
from pyuffd.sources import PROMISED, Promised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from pyuffd.handlers._served_parts import Part
    from pyuffd.lowlevel import Granted
    from pyuffd.pagemap import Pagemap

log = logging.getLogger(__name__)

LEAVE_NS = 1_000_000_000
LEFT_S, LOOK_S = 1.0, 0.005
MAX_ERRNO = 4095  # Linux's


class Engine(EnginePages, EngineReports):
    """One `struct uffd_engine`; the userfaultfds are borrowed.

    `workers` threads will call `next_request`. `stall_limit_ns` is the longest that a
    request may last (0: no limit), and `stall_signal` the signal that then writes the tracebacks
    (0: none). `keeper_fd` and `shared` are for an engine that may be killed (engine/successor.h):
    the stream for its reports, and the address of memory that its successor gets too. `helper` is
    for a stand-in: pid and pidfd of the process whose end it waits for, and a pipe that this
    process and its children hold open.
    """

    calls_python = False
    is_remote = False
    _instead = "it serves memory of one process"

    def __init__(
        self,
        fd: int,
        *,
        owner_pid: int,
        on_error: OnError,
        inline: bool = False,
        layout_events: int = 0,
        watch_owner: bool = False,
        workers: int = 0,
        stall_signal: int = 0,
        stall_limit_ns: int = 0,
        prefetch: int,
        spin_ns: int,
        retry_limit_ns: int,
        say_fd: int = -1,
        fault_log: int = 0,
        keeper_fd: int = -1,
        shared: int = 0,
        helper: tuple[int, int, int] = (0, -1, -1),
    ) -> None:
        options = ffi.new("struct uffd_engine_options *")
        options.fd = fd
        options.owner_pid = owner_pid
        options.on_error = on_error
        options.is_inline = inline
        options.layout_events = layout_events
        options.watch_owner = watch_owner
        options.has_workers = workers
        options.stall_signal = stall_signal
        options.has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        options.stall_limit_ns = stall_limit_ns
        options.prefetch = prefetch
        options.spin_ns = spin_ns
        options.retry_limit_ns = retry_limit_ns
        options.say_fd = say_fd
        options.fault_log = fault_log
        options.keeper_fd = keeper_fd
        options.shared = ffi.cast("void *", shared)
        options.helper_pid, options.helper_pidfd, options.helper_life = helper
        self.life = EngineLife()
        call = ffi.new("char **")
        code = lib.uffd_engine_create(options, self.life.place, call)
        if code:
            raise_start_error("make a fault engine", -code, _name(call))
        self._pointer = self.life.pointer()
        self._inline = inline
        self._leave_by = math.inf  # when threads that a source still blocks are left
        self._owner_pid = owner_pid
        self._owners: dict[int, object] = {}
        self._added_last: tuple[int, int, int, Any] | None = None

    def own(self) -> None:
        """Note that somebody will call `destroy`, even if all of it is garbage."""
        self.life.own()

    def destroy(self) -> None:
        """Free it as soon as no thread is inside; the caller keeps what its ranges need."""
        self._pointer = None
        self._owners.clear()
        self.life.let_go()

    def add_space(self, fd: int, *, layout_events: int, owner_pid: int) -> int:
        """Serve another userfaultfd too; return the number of its space."""
        out = ffi.new("uint32_t *")
        try:
            code = lib.uffd_engine_add_space(self._engine(), fd, layout_events, owner_pid, out)
            if code:
                raise_errno("serve another userfaultfd", -code)
            return int(out[0])
        except BaseException:
            if out[0]:  # interrupted: the caller does not know of it
                self.remove_space(out[0])
            raise

    def adopt_space(
        self, fd: int, space: int, *, is_fork: bool, layout_events: int, owner_pid: int
    ) -> None:
        """Continue a space of another engine; this engine then owns a fork's descriptor."""
        engine = self._engine()
        code = lib.uffd_engine_adopt_space(engine, fd, is_fork, layout_events, owner_pid, space)
        if code:
            raise_errno("take over a userfaultfd", -code)

    def expect_unmap(self, space: int, start: int, end: int) -> None:
        """Expect an UNMAP event for memory that moved away while another engine served it."""
        code = lib.uffd_engine_expect_unmap(self._engine(), space, start, end)
        if code:
            raise_errno("take over a userfaultfd", -code, start, end - start)

    def replay(self, reported: int) -> None:
        """Apply the events that a dead engine had read, after the last one that it reported."""
        lib.uffd_engine_replay(self._engine(), reported)

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd whose ranges have been taken out."""
        code = lib.uffd_engine_remove_space(self._engine(), space, LEAVE_NS)
        if code == -errno.EBUSY:
            log.warning(
                "pyuffd: a thread does not return and may still use a userfaultfd that is closed"
            )

    def add(self, given: RangeSpec, *, states_fd: int = -1, taken: Taken | None = None) -> RangeId:
        """Put a range in; its `owner` is kept alive until it is taken out.

        `states_fd` is a file for the pages' states. With `taken` the range continues where another
        engine served it.
        """
        content = given.content
        spec, keeps = range_spec(given, states_fd, taken)
        out = ffi.new("uint64_t *")
        self._added_last = given.space, given.start, given.length, out
        code = lib.uffd_engine_add(self._engine(), given.space, spec, out)
        del keeps
        if code == -errno.EEXIST:
            raise ValueError(
                f"[{given.start:#x}, +{given.length:#x}) overlaps a range that is served already"
            )
        if content.overlay is not None and code in (-errno.EPERM, -errno.ENOSYS):
            hint = (
                "this overlay has pieces that begin or end inside a page, which are put together by"
                " process_vm_readv(2), and a seccomp filter refuses that"
            )
            raise_errno("serve", -code, given.start, given.length, hint=hint)
        if code:
            raise_errno("serve", -code, given.start, given.length)
        served = RangeId(given.space, int(out[0]), given.start, given.length)
        self._owners[served.number] = (content.owner, given.owner)
        self._added(served, given)
        return served

    def serve_many(self, space: int, given: Sequence[RangeSpec], needed: int, out: Served) -> None:
        """Add and register ranges, and note in `out` which, as far as all can be served.

        `needed`: the ioctls that each must support. What could not be served is as before.
        """
        specs, keeps = range_specs(given)
        lib.uffd_engine_serve_many(self._engine(), space, specs, len(given), needed, out.rows)
        del keeps
        for one, each in zip(out.ranges(space, given), given, strict=False):
            self._owners[one.number] = (each.content.owner, each.owner)

    def find(self, space: int, start: int) -> RangeId | None:
        """Return the range that an interrupted `add` has put in there, or None."""
        if self._added_last is None or self._added_last[:2] != (space, start):
            return None
        _, _, length, out = self._added_last
        return RangeId(space, int(out[0]), start, length) if out[0] else None

    def _added(self, served: RangeId, given: RangeSpec) -> None:
        """Called with a range before it is registered."""

    def open(
        self,
        served: RangeId,
        how: Opening,
        granted: Granted,
        pagemap: Pagemap | int | None = None,
    ) -> int:
        """Register a range, look for pages that are present, and begin to serve it."""
        poison = ffi.new("uint64_t[]", how.poison)
        fd = -1 if pagemap is None else pagemap if isinstance(pagemap, int) else pagemap.fileno()
        opening = ffi.new(
            "struct uffd_opening *",
            {
                "present": how.present,
                "pagemap_fd": fd,
                "needed": how.needed,
                "before": how.before,
                "stays_registered": how.stays_registered,
                "reads_events": how.reads_events,
                "poison": poison,
                "poison_count": len(poison) // 2,
            },
        )
        granted.follow(ffi.addressof(opening, "ioctls"), opening)
        code = lib.uffd_engine_open(self._engine(), range_ref(served), opening)
        if code:
            _raise_not_opened(served, how, opening, -code)
        return granted.ioctls

    def open_dropped(
        self, served: RangeId, how: Opening, granted: Granted, fd: int, *, shared: bool
    ) -> int:
        """Do it by `open`, which drops memory of this process."""
        return self.open(served, how._replace(present=IfPresent.DROP), granted)

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Begin to serve a range that its owner registers."""
        lib.uffd_engine_set_ioctls(self._engine(), range_ref(served), ioctls)

    def list_registered(
        self, space: int, ranges: Sequence[tuple[int, int]], *, is_all: bool = False
    ) -> None:
        """Note ranges (start, length) that are, or will be, registered; `is_all`: no others are."""
        for start, length in ranges:
            code = lib.uffd_engine_note_registered(self._engine(), space, start, start + length)
            if code:
                raise_errno("note a registered range", -code, start, length)
        if is_all:
            lib.uffd_engine_know_registered(self._engine(), space)

    def unlist_registered(self, space: int, start: int, length: int) -> None:
        """Note that a range is no longer registered."""
        lib.uffd_engine_note_unregistered(self._engine(), space, start, start + length)

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = PATIENCE_S,
        gently: bool = False,
        part: Part | None = None,
    ) -> bool:
        """Take a range, or a part of it, out in every space; see engine/unserve.h.

        Only with `gently`: return False if a thread still works on a page; the range is then served
        as before.
        """
        flags = (lib.UFFD_UNSERVE_SEAL if seal else 0) | (
            lib.UFFD_UNSERVE_UNREGISTER if unregister else 0
        )
        flags |= lib.UFFD_UNSERVE_GENTLY if gently else 0
        # No name for the engine's pointer: the traceback of an interruption would keep it alive.
        ref, patience_ns = range_ref(served), int(patience_s * 1e9)
        begin, end = part or (0, served.length)
        if part is None:
            code = lib.uffd_engine_unserve(self._engine(), ref, flags, patience_ns)
        else:
            code = lib.uffd_engine_unserve_part(
                self._engine(), ref, begin, end - begin, flags, patience_ns
            )
        if code == -errno.ETIME:
            return False
        if code:
            raise_errno("unserve", -code, served.start + begin, end - begin)
        if part is not None:
            return True
        self._owners.pop(served.number, None)
        if self._added_last is not None and int(self._added_last[3][0]) == served.number:
            self._added_last = None
        return True

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""
        call = ffi.new("char **")
        if self._inline:
            code = lib.uffd_inline_start(self._engine())
        else:
            code = lib.uffd_native_start(self._engine(), cpus, len(cpus), call)
        if code:
            raise_start_error("start a fault handler", -code, _name(call) or "sigaction")
        # A process that had the descriptor before may have died after it read faults.
        if not self._inline:
            lib.uffd_engine_wake_read(self._engine())

    def stop(self) -> None:
        """Stop a native driver without ranges, so that another engine can read its userfaultfds."""
        lib.uffd_native_stop(self._engine())

    def end(self, patience_s: float) -> Ended:
        """Seal and take out every range, and end the driver.

        Wait at most `patience_s` in all for threads that a source blocks, then leave them.
        """
        engine = self._engine()
        self._leave_by = min(self._leave_by, time.monotonic() + patience_s)
        stays = lib.uffd_engine_end(engine, int(patience_s * 1e9)) != 0
        # A source may still be at work for a range that was taken out, or a page that was poisoned,
        # before. Nobody waits for its answer, so it gets no longer than this.
        leave_at = time.monotonic() + LEFT_S
        while self.held() and time.monotonic() < min(self._leave_by, leave_at):
            time.sleep(LOOK_S)
        if self._inline:
            lib.uffd_inline_stop(engine, faulthandler_left())
        return Ended(self.held(), stays)

    def hurry(self, patience_s: float) -> None:
        """Let drain and end, in other threads, wait no longer than this."""
        self._leave_by = min(self._leave_by, time.monotonic() + patience_s)
        lib.uffd_engine_hurry(self._engine(), int(patience_s * 1e9))

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; return False after the limit."""
        return self._inline or lib.uffd_native_drain(self._engine(), limit_ns) == 0

    def pause(self, limit_ns: int) -> int:
        """Resolve no fault for at most `limit_ns`; return a token for `resume`."""
        token = ffi.new("uint64_t *")
        code = lib.uffd_engine_pause(self._engine(), limit_ns, token)
        if code:
            raise_errno("hold faults", -code)
        return int(token[0])

    def resume(self, token: int) -> bool:
        """Resolve faults again; return False if this engine did so before."""
        return bool(lib.uffd_engine_resume(self._engine(), token) == 0)

    def leave_strays(self) -> None:
        """Leave faults in ranges that are not served to the next engine of these userfaultfds."""
        lib.uffd_engine_leave_strays(self._engine())

    def wake_all(self) -> None:
        """Wake every thread that waits, so that it faults again."""
        lib.uffd_engine_wake_all(self._engine())

    def refuse(self) -> None:
        """Poison pages that fault from now on."""
        lib.uffd_engine_refuse(self._engine())

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker, of one range or all; `failed` counts them."""
        code = errno.ETIMEDOUT if failed else 0
        lib.uffd_engine_abandon(self._engine(), served.number if served else 0, code)

    def abandon_part(self, served: RangeId, begin: int, end: int) -> None:
        """Poison the pages of a part that wait for a worker."""
        lib.uffd_engine_abandon_part(self._engine(), served.number, begin, end - begin)

    def answer_requests(
        self,
        read: Callable[[int, int, int], Buffer | Promised],
        fail: Callable[[Request, BaseException], int],
    ) -> None:
        """Fetch pages until the engine stops.

        `read` is called with a range's number, an offset and a length, and returns that many bytes,
        or `PROMISED` where `fill` will bring them.
        If it raises, `fail` is called with the exception and returns the errno for `on_error`.
        """
        engine = self._engine()
        try:
            request = lib.uffd_engine_next_request(engine)
            while request:
                length = request.length
                try:
                    data = read(request.id, request.offset, length)
                    if data is PROMISED:  # the content comes by `fill`
                        request = lib.uffd_engine_promise_next(engine, request)
                        continue
                    size = len(data) if type(data) is bytes else _size_of(data, request)
                    if size != length:
                        raise HandlerError(
                            f"a page source returned {size:#x} bytes for {length:#x} at offset"
                            f" {request.offset:#x}",
                            request.address,
                            length,
                        )
                    if type(data) is bytes:  # one call, one release of the GIL
                        request = lib.uffd_engine_complete_next(engine, request, data)
                        continue
                    with ffi.from_buffer(data) as pointer:
                        lib.uffd_engine_complete(engine, request, pointer)
                except BaseException as error:  # a thread waits for the page, so catch everything
                    if lib.uffd_engine_ask_again(engine, request):
                        log_debug(log, "the source failed; asking again for fewer pages", error)
                    else:
                        failed = Request(
                            request.id,
                            request.offset,
                            request.address,
                            length,
                            bool(request.is_fault),
                            bool(request.abandoned),
                        )
                        lib.uffd_engine_fail(engine, request, _errno_of(fail, failed, error))
                request = lib.uffd_engine_next_request(engine)
        finally:
            # The traceback of a source's exception keeps this frame, and the engine would outlive
            # its end in it.
            del engine


def _errno_of(
    fail: Callable[[Request, BaseException], int], failed: Request, error: BaseException
) -> int:
    """Return what `fail` does; a report that itself fails must not leave the page waiting."""
    try:
        code = fail(failed, error)
        # OSError takes anything for it: OSError("no such page", path) has a text.
        return code if type(code) is int and 0 < code <= MAX_ERRNO else errno.EIO
    except BaseException as other:
        with suppress(BaseException):
            log_error(log, "pyuffd: a failure of a page source cannot be reported", other)
        return errno.EIO


def _raise_not_opened(served: RangeId, how: Opening, opening: Any, code: int) -> NoReturn:
    start, length, step = served.start, served.length, opening.step
    if step == lib.UFFD_OPEN_LOOK and code == errno.EEXIST:
        raise PagesPresentError(opening.present_at)
    if step == lib.UFFD_OPEN_REGISTER and code == errno.EOPNOTSUPP and opening.supported:
        raise lacks_error(served, how.needed, opening.supported)
    if how.present is IfPresent.DROP and code == errno.EAGAIN:
        raise DropRacedError
    if step == lib.UFFD_OPEN_REGISTER:
        raise_errno("UFFDIO_REGISTER", code, start, length, mode=how.mode)
    op = {lib.UFFD_OPEN_DROP: "madvise", lib.UFFD_OPEN_POISON: "UFFDIO_POISON"}.get(step, "serve")
    raise_errno(op, code, start, length)


def _size_of(data: object, request: Any) -> int:
    try:
        return memoryview(data).nbytes  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"the page source returned {type(data).__name__}, and no buffer, for"
            f" {request.length:#x} bytes at offset {request.offset:#x}"
        ) from None


def _name(call: Any) -> str:
    return ffi.string(call[0]).decode() if call[0] else ""
