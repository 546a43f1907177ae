"""The C engine as an object: arguments in, exceptions out, no policy (layer L4)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pyuffd._abi import PagefaultFlag, RegisterMode
from pyuffd._errors import ClosedError, raise_errno
from pyuffd._shim import ffi, lib

RECENT_CAPACITY = 4096
KINDS = ("missing", "wp", "minor")


class PageState(IntEnum):
    """What the engine knows of a page; `Handler.page_states` returns one byte each."""

    ABSENT = lib.UFFD_PAGE_ABSENT
    IN_FLIGHT = lib.UFFD_PAGE_IN_FLIGHT
    CLEAN = lib.UFFD_PAGE_CLEAN
    DIRTY = lib.UFFD_PAGE_DIRTY
    REMOVED = lib.UFFD_PAGE_REMOVED
    POISONED = lib.UFFD_PAGE_POISONED
    SAVED = lib.UFFD_PAGE_SAVED


class OnError(IntEnum):
    """What happens to a page whose content cannot be had."""

    POISON = lib.UFFD_ON_ERROR_POISON
    STALL = lib.UFFD_ON_ERROR_STALL
    KILL = lib.UFFD_ON_ERROR_KILL


class SourceKind(IntEnum):
    """Which content the engine puts into absent pages."""

    NONE = lib.UFFD_SOURCE_NONE
    ZERO = lib.UFFD_SOURCE_ZERO
    MEMORY = lib.UFFD_SOURCE_MEMORY
    FILE = lib.UFFD_SOURCE_FILE


class FailureStage(IntEnum):
    """What went wrong first."""

    NOTHING = lib.UFFD_FAILED_NOTHING
    SOURCE = lib.UFFD_FAILED_SOURCE
    RESOLVE = lib.UFFD_FAILED_RESOLVE
    UNSERVED = lib.UFFD_FAILED_UNSERVED
    READ = lib.UFFD_FAILED_READ
    LAYOUT = lib.UFFD_FAILED_LAYOUT


@dataclass(frozen=True, slots=True)
class Content:
    """Where the engine reads a range's pages; `owner` must live as long as the range."""

    kind: SourceKind
    address: int = 0
    fd: int = -1
    offset: int = 0
    length: int = 0
    owner: object = None


@dataclass(frozen=True, slots=True)
class Failure:
    """How many pages failed, and the first of them."""

    count: int
    address: int
    length: int
    error: int
    stage: FailureStage


@dataclass(frozen=True, slots=True)
class RecentFault:
    """One resolved fault.

    `time_ns` is CLOCK_MONOTONIC when it was resolved, `latency_ns` the time since its message was
    read (native) or its signal came (inline).
    """

    time_ns: int
    address: int
    flags: PagefaultFlag
    thread_id: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency histogram: (upper bound in ns, faults) of every bucket that is not empty.

    Bounds grow by 12.5 % at most, which is how well a percentile is known.
    """

    buckets: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of faults."""
        return sum(faults for _, faults in self.buckets)

    def percentile(self, percent: float) -> int:
        """Return the bound in ns that `percent` of the faults stayed below; 0 without faults."""
        wanted = self.count * percent / 100
        seen = 0
        for bound, faults in self.buckets:
            seen += faults
            if seen >= wanted:
                return bound
        return 0


@dataclass(frozen=True, slots=True)
class HandlerStats:
    """Counters since the handler was made, read without stopping it.

    `faults` and `latency` go by kind: "missing", "wp", "minor". `messages` counts what was read:
    a fault that was interrupted sends several. Pages are of their region's size.
    """

    faults: dict[str, int]
    latency: dict[str, Latency]
    messages: int
    filled_pages: int
    prefetched_pages: int
    already_present: int
    preserved_pages: int
    deferred: int
    retried: int
    poisoned_pages: int
    failed: int
    layout_changed: int
    unserved: int
    layout_events: int


_COUNTERS = [
    "messages",
    "filled_pages",
    "prefetched_pages",
    "already_present",
    "preserved_pages",
    "deferred",
    "retried",
    "poisoned_pages",
    "failed",
    "layout_changed",
    "unserved",
    "layout_events",
]


class Engine:
    """One `struct uffd_engine`; the userfaultfd is borrowed."""

    def __init__(
        self,
        fd: int,
        *,
        owner_pid: int,
        on_error: OnError,
        inline: bool,
        prefetch: int,
        spin_ns: int,
        retry_limit_ns: int,
    ) -> None:
        options = ffi.new("struct uffd_engine_options *")
        options.fd = fd
        options.owner_pid = owner_pid
        options.on_error = on_error
        options.is_inline = inline
        options.prefetch = prefetch
        options.spin_ns = spin_ns
        options.retry_limit_ns = retry_limit_ns
        out = ffi.new("struct uffd_engine **")
        code = lib.uffd_engine_create(options, out)
        if code:
            raise_errno("make a fault engine", -code)
        self._pointer: Any = out[0]
        self._inline = inline
        self._running = False
        self._owners: dict[int, object] = {}

    def _engine(self) -> Any:
        if self._pointer is None:
            raise ClosedError("this handler has stopped")
        return self._pointer

    def destroy(self) -> None:
        """Free it; the driver has stopped and no range is left."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            lib.uffd_engine_destroy(pointer)

    def add(
        self,
        start: int,
        length: int,
        page_size: int,
        mode: RegisterMode,
        content: Content,
        *,
        local: int = 0,
        preserve: int = 0,
        owner: object = None,
    ) -> int:
        """Put a range in and return its id; `owner` is kept until it is taken out."""
        spec = ffi.new("struct uffd_range_spec *")
        spec.start = start
        spec.length = length
        spec.page_size = page_size
        spec.mode = mode
        spec.source = content.kind
        spec.source_fd = content.fd
        spec.source_address = content.address
        spec.source_offset = content.offset
        spec.source_length = content.length
        spec.local = local
        spec.preserve = preserve
        out = ffi.new("uint64_t *")
        code = lib.uffd_engine_add(self._engine(), spec, out)
        if code == -errno.EEXIST:
            raise ValueError(f"[{start:#x}, +{length:#x}) overlaps a range that is served already")
        if code:
            raise_errno("serve", -code, start, length)
        self._owners[out[0]] = (content.owner, owner)
        return int(out[0])

    def set_ioctls(self, range_id: int, ioctls: int) -> None:
        """Tell which ioctls the registered range takes."""
        lib.uffd_engine_set_ioctls(self._engine(), range_id, ioctls)

    def remove(self, range_id: int) -> None:
        """Take a range out and wait until nobody uses it."""
        lib.uffd_engine_remove(self._engine(), range_id)
        self._owners.pop(range_id, None)

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""
        if self._inline:
            code = lib.uffd_inline_start(self._engine())
        else:
            code = lib.uffd_native_start(self._engine(), cpus, len(cpus))
        if code:
            raise_errno("start a fault handler", -code)
        self._running = True

    def stop(self) -> None:
        """Stop the driver and wait for it."""
        if not self._running:
            return
        self._running = False
        if self._inline:
            lib.uffd_inline_stop(self._engine())
        else:
            lib.uffd_native_stop(self._engine())

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; False when the time ran out."""
        return self._inline or lib.uffd_native_drain(self._engine(), limit_ns) == 0

    def refuse(self) -> None:
        """Poison what is asked for from now on."""
        lib.uffd_engine_refuse(self._engine())

    def seal(self, range_id: int, length: int) -> None:
        """Poison what is absent and lift write-protection, before unregistering."""
        code = lib.uffd_engine_seal(self._engine(), range_id)
        if code and code not in (-errno.ENOENT, -errno.ESRCH):
            raise_errno("seal", -code, range_id, length)

    def populate(self, range_id: int, offset: int, length: int) -> int:
        """Fill absent pages; return the bytes filled."""
        out = ffi.new("uint64_t *")
        code = lib.uffd_engine_populate(self._engine(), range_id, offset, length, out)
        if code:
            raise_errno("populate", -code, range_id + offset, length, completed=out[0])
        return int(out[0])

    def preserve(self, range_id: int, offset: int, length: int) -> int:
        """Save protected pages and unprotect them; return the bytes saved."""
        out = ffi.new("uint64_t *")
        code = lib.uffd_engine_preserve(self._engine(), range_id, offset, length, out)
        if code:
            raise_errno("preserve", -code, range_id + offset, length, completed=out[0])
        return int(out[0])

    def states(self, range_id: int, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""
        out = bytearray(pages)
        with ffi.from_buffer("uint8_t[]", out) as pointer:
            code = lib.uffd_engine_states(self._engine(), range_id, first_page, pages, pointer)
        if code:
            raise_errno("page states", -code, range_id)
        return bytes(out)

    def set_states(self, range_id: int, first_page: int, pages: int, state: PageState) -> None:
        """Set the state byte of some pages."""
        code = lib.uffd_engine_set_states(self._engine(), range_id, first_page, pages, state)
        if code:
            raise_errno("page states", -code, range_id)

    def stats(self) -> HandlerStats:
        """Sum up the counters."""
        out = ffi.new("struct uffd_stats *")
        lib.uffd_engine_stats(self._engine(), out)
        return HandlerStats(
            faults={name: out.faults[kind] for kind, name in enumerate(KINDS)},
            latency={
                name: Latency(_buckets(out.latency_ns[kind])) for kind, name in enumerate(KINDS)
            },
            **{name: getattr(out, name) for name in _COUNTERS},
        )

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last, newest first."""
        out = ffi.new("struct uffd_recent_fault[]", RECENT_CAPACITY)
        found = lib.uffd_engine_recent(self._engine(), out, RECENT_CAPACITY)
        return [
            RecentFault(
                fault.time_ns,
                fault.address,
                PagefaultFlag(fault.flags),
                fault.thread_id,
                fault.latency_ns,
            )
            for fault in out[0:found]
        ]

    def failure(self) -> Failure | None:
        """Return what went wrong, or None."""
        out = ffi.new("struct uffd_failure *")
        lib.uffd_engine_failure(self._engine(), out)
        if not out.count:
            return None
        return Failure(out.count, out.address, out.length, out.error, FailureStage(out.stage))


def ensure_inline_handler() -> bool:
    """Put the SIGBUS handler back on top; return whether another had taken its place."""
    if lib.uffd_inline_is_installed():
        return False
    code = lib.uffd_inline_reinstall()
    if code:
        raise_errno("sigaction(SIGBUS)", -code)
    return True


def _buckets(counts: Any) -> tuple[tuple[int, int], ...]:
    return tuple(
        (lib.uffd_histogram_bound(index), faults)
        for index, faults in enumerate(ffi.unpack(counts, lib.UFFD_HISTOGRAM_BUCKETS))
        if faults
    )
