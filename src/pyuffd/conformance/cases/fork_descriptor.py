"""What the descriptor of a fork inherits from the parent's: features, flags, ranges (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
import re
import select
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd._abi import Feature, RegisterMode, WriteprotectMode
from pyuffd._events import MESSAGE_SIZE, Remap, Remove, Unmap
from pyuffd._memory import Interrupted
from pyuffd._uffd import Fork, Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Child, Context
from pyuffd.conformance._types import (
    ALL,
    ANON,
    ANY,
    FILE,
    SMALL,
    minor_features,
    missing_features,
    missing_wp_features,
    wp_features,
)
from pyuffd.conformance._wp import IN_FILE, in_page_cache
from pyuffd.conformance.cases.errno_read import INITIALIZED
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType
from pyuffd.testing._need import needs_privilege

SYS_READ, SYS_OPEN, SYS_MUNMAP, SYS_MREMAP, SYS_MADVISE = 0, 2, 11, 25, 28
MADV_WIPEONFORK = 18
SIGBUS = 7
FORK = Feature.EVENT_FORK
ORIGIN = "fs/userfaultfd.c: resolve_userfault_fork, dup_userfaultfd"
MISSING_READ, MISSING_WRITE, WP_WRITE, MINOR_READ = 0, 1, 3, 4
VALUE = 0x44
FORK_MESSAGE = 0x13  # UFFD_EVENT_FORK
MESSAGE = struct.Struct("=B7xI")


def _child(ctx: Context) -> tuple[Child, Userfaultfd]:
    child = ctx.fork()
    if child.uffd is None:
        ctx.fail("the fork's descriptor", "none", "one")
    return child, child.uffd


def _in_fdinfo(ctx: Context, uffd: Userfaultfd) -> int:
    """Return the enabled features as fdinfo shows them."""
    text = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
    found = re.search(r"^API:\t[0-9a-f]+:([0-9a-f]+):", text, re.MULTILINE)
    if found is None:
        ctx.fail("fdinfo", text, "a line that starts with API:")
    return int(found[1], 16) & ~INITIALIZED


# Features


@dataclass(frozen=True)
class Inherited:
    """A feature, and a check that the child's descriptor has it.

    `mode` is the register mode of the range, `has` makes the check, and `needs` returns the other
    features that the check needs on a memory type.
    """

    feature: Feature
    mode: RegisterMode
    has: Callable[[Context, Region, Child, Userfaultfd], None]
    needs: Callable[[MemoryType], Feature] = missing_features
    memory: tuple[str, ...] = ALL


def _sigbus(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    seen = child.read(region.start, 1)
    ctx.expect(
        "signal of the child's read", seen.number if isinstance(seen, Interrupted) else seen, SIGBUS
    )
    ctx.expect_quiet(uffd)


def _thread_id(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    reading = ctx.start(child.read, region.start, 1)
    fault = ctx.expect_fault(MISSING_READ, region.start, uffd)
    ctx.expect("thread of the message", fault.thread_id, child.pid)
    uffd.copy(region.start, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([VALUE]))


def _exact_address(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    at = region.start + ctx.page - 1
    reading = ctx.start(child.read, at, 1)
    ctx.expect_fault(MISSING_READ, at, uffd)
    uffd.copy(region.start, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([VALUE]))


def _unpopulated(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    uffd.writeprotect(region)
    ctx.expect(
        "whether a hole in the child is protected",
        ctx.is_protected(region.start, pid=child.pid),
        True,
    )
    writing = ctx.start(child.write, region.start, b"\1")
    ctx.expect_fault(WP_WRITE, region.start, uffd)
    uffd.writeprotect(region, mode=WriteprotectMode(0))
    ctx.expect("the write", writing.result(), None)


def _async(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    uffd.writeprotect(region)
    ctx.expect(
        "whether the child's page is protected", ctx.is_protected(region.start, pid=child.pid), True
    )
    ctx.expect("the write", ctx.silently(child.write, region.start, b"\1"), None)
    ctx.expect_quiet(uffd)
    ctx.expect(
        "whether it is protected after a write",
        ctx.is_protected(region.start, pid=child.pid),
        False,
    )


def _poison(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    reading = ctx.start(child.read, region.start, 1)
    ctx.expect_fault(MISSING_READ, region.start, uffd)
    uffd.poison(region.start, ctx.page)
    seen = reading.result()
    ctx.expect(
        "signal of the child's read", seen.number if isinstance(seen, Interrupted) else seen, SIGBUS
    )


def _remove(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    call = ctx.start(child.syscall, SYS_MADVISE, region.start, ctx.page, mmap.MADV_DONTNEED)
    event = ctx.expect_event(Remove, uffd)
    ctx.expect("the event", event, Remove(region.start, region.start + ctx.page))
    ctx.expect("madvise", call.result(), 0)


def _unmap(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    call = ctx.start(child.syscall, SYS_MUNMAP, region.start, ctx.page)
    event = ctx.expect_event(Unmap, uffd)
    ctx.expect("the event", event, Unmap(region.start, region.start + ctx.page))
    ctx.expect("munmap", call.result(), 0)


def _remap(ctx: Context, region: Region, child: Child, uffd: Userfaultfd) -> None:
    target = ctx.make(1)
    arguments = (SYS_MREMAP, region.start, ctx.page, ctx.page, 3, target.start)
    call = ctx.start(child.syscall, *arguments)
    event = ctx.expect_event(Remap, uffd)
    ctx.expect("the event", event, Remap(region.start, target.start, ctx.page))
    ctx.expect("mremap", call.result(), target.start)


MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
INHERITED = (
    Inherited(Feature.SIGBUS, MISSING, _sigbus),
    Inherited(Feature.THREAD_ID, MISSING, _thread_id),
    Inherited(Feature.EXACT_ADDRESS, MISSING, _exact_address),
    Inherited(Feature.WP_UNPOPULATED, WP, _unpopulated, wp_features),
    Inherited(Feature.WP_ASYNC, WP, _async, wp_features),
    Inherited(Feature.POISON, MISSING, _poison),
    Inherited(Feature.EVENT_REMOVE, MISSING, _remove, memory=SMALL),
    Inherited(Feature.EVENT_UNMAP, MISSING, _unmap),
    Inherited(Feature.EVENT_REMAP, MISSING, _remap, memory=SMALL),
)


def _add(row: Inherited) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        ctx.register(region, row.mode)
        if row.feature is Feature.WP_ASYNC:
            region.fill(1)
        child, uffd = _child(ctx)
        ctx.expect("features in fdinfo", _in_fdinfo(ctx, uffd), _in_fdinfo(ctx, ctx.uffd))
        row.has(ctx, region, child, uffd)
        ctx.expect_quiet()

    name = str(row.feature.name).lower().replace("_", "-")
    case(
        f"fork-descriptor.feature.{name}",
        summary=f"The descriptor of a fork has {row.feature.name} if the parent's has",
        origin=ORIGIN,
        memory=row.memory,
        features=lambda memory: row.needs(memory) | row.feature | FORK,
    )(run)


for _row in INHERITED:
    _add(_row)


@case("fork-descriptor.feature.none", origin=ORIGIN, features=lambda m: missing_features(m) | FORK)
def none_inherited(ctx: Context) -> None:
    """The descriptor of a fork lacks the features that the parent's lacks."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    child, uffd = _child(ctx)
    ctx.expect("features in fdinfo", _in_fdinfo(ctx, uffd), _in_fdinfo(ctx, ctx.uffd))
    reading = ctx.start(child.read, region.start + ctx.page - 1, 1)
    fault = ctx.expect_fault(MISSING_READ, region.start, uffd)
    ctx.expect("thread of the message", fault.thread_id or 0, 0)
    uffd.copy(region.start, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([VALUE]))
    # Without EVENT_REMOVE, madvise sends no event and does not wait.
    if not ctx.memory.is_hugetlb:
        advice = (SYS_MADVISE, region.start, ctx.page, mmap.MADV_DONTNEED)
        ctx.expect("madvise", ctx.silently(child.syscall, *advice), 0)
    ctx.expect_quiet(uffd)


@case("fork-descriptor.feature.fork", origin=ORIGIN, features=lambda m: missing_features(m) | FORK)
def fork_inherited(ctx: Context) -> None:
    """A fork in the child sends its event to the child's descriptor, with another descriptor."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    child, uffd = _child(ctx)
    forking = ctx.start(child.fork)
    event = ctx.expect_event(Fork, uffd)
    ctx.callback(event.uffd.close)
    forking.result()
    ctx.expect("features in fdinfo", _in_fdinfo(ctx, event.uffd), _in_fdinfo(ctx, ctx.uffd))
    ctx.expect_quiet()


# Flags


@case(
    "fork-descriptor.flags.user-mode-only",
    origin=ORIGIN,
    features=lambda memory: missing_features(memory) | FORK,
    needs=[needs_privilege("CAP_SYS_PTRACE")],
)
def user_mode_only(ctx: Context) -> None:
    """The descriptor of a fork is user-mode-only if the parent's is: read(2) is EFAULT."""
    region = ctx.make(1)
    scratch = ctx.make(1, "anon")
    scratch.write(0, b"/dev/zero\0")
    for is_user_only in (True, False):
        uffd = ctx.open(user_mode_only=is_user_only)
        uffd.register(region, mode=MISSING)
        child = ctx.fork(uffd)
        if child.uffd is None:
            ctx.fail("the fork's descriptor", "none", "one")
        file = child.syscall(SYS_OPEN, scratch.start, os.O_RDONLY, 0)
        ctx.expect("whether open in the child succeeds", file >= 0, True)
        reading = ctx.start(child.syscall, SYS_READ, file, region.start, 1)
        if is_user_only:
            ctx.expect("read(2) in the child", reading.result(), -errno.EFAULT)
        else:
            ctx.expect_fault(MISSING_WRITE, region.start, child.uffd)
            child.uffd.copy(region.start, bytes(ctx.page))
            ctx.expect("read(2) in the child", reading.result(), 1)
        ctx.expect_quiet(child.uffd)
        uffd.close()


@dataclass(frozen=True)
class Opened:
    """How the parent's descriptor is opened and then changed."""

    name: str
    text: str
    at_open: int
    later: int | None = None


OPENED = (
    Opened("nonblock", "opened with O_NONBLOCK", os.O_NONBLOCK),
    Opened("blocking", "opened without O_NONBLOCK", 0),
    Opened("made-blocking", "opened with O_NONBLOCK, made blocking by fcntl", os.O_NONBLOCK, 0),
    Opened(
        "made-nonblock", "opened without O_NONBLOCK, made non-blocking by fcntl", 0, os.O_NONBLOCK
    ),
)


def _add_flags(opened: Opened) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1, "anon")
        uffd = ctx.open(nonblocking=bool(opened.at_open))
        uffd.register(region, mode=MISSING)
        if opened.later is not None:
            os.set_blocking(uffd.fileno(), not opened.later)
        reading = ctx.start(_read_message, ctx, uffd)
        ctx.fork_only()
        code, fd = reading.result()
        ctx.callback(os.close, fd)
        ctx.expect("type of the event", code, FORK_MESSAGE)
        blocking = not opened.at_open
        ctx.expect("whether the fork's descriptor blocks", os.get_blocking(fd), blocking)
        if not blocking:
            ctx.expect_errno(errno.EAGAIN, os.read, fd, 64)

    case(
        f"fork-descriptor.flags.{opened.name}",
        summary=f"A fork's descriptor has O_NONBLOCK if the parent's was opened so: {opened.text}",
        origin=ORIGIN,
        memory=ANY,
        features=FORK,
    )(run)


def _read_message(ctx: Context, uffd: Userfaultfd) -> tuple[int, int]:
    # Poll does not work on a blocking descriptor, but there the read itself waits.
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            code, fd = MESSAGE.unpack_from(os.read(uffd.fileno(), MESSAGE_SIZE))
        except BlockingIOError:
            select.select([uffd.fileno()], [], [], WAIT_S)
            continue
        return int(code), int(fd)
    ctx.fail("messages", f"none within {WAIT_S:g} s", "the Fork event")


for _opened in OPENED:
    _add_flags(_opened)


# Ranges


@case(
    "fork-descriptor.ranges.modes", origin=ORIGIN, features=lambda m: missing_wp_features(m) | FORK
)
def modes_inherited(ctx: Context) -> None:
    """The child's ranges have the modes of the parent's, and other pages are not registered."""
    region = ctx.make(4)
    missing, gap, protected, both = (region.start + index * ctx.page for index in range(4))
    uffd = ctx.open()
    uffd.register(missing, ctx.page, mode=MISSING)
    uffd.register(protected, ctx.page, mode=WP)
    uffd.register(both, ctx.page, mode=MISSING | WP)
    region.fill(1, 2 * ctx.page, ctx.page)
    uffd.copy(both, bytes([1]) * ctx.page)
    uffd.writeprotect(protected, 2 * ctx.page)
    child, own = _child(ctx)
    ctx.expect("byte of the page that is not registered", ctx.silently(child.read, gap, 1), b"\0")
    reading = ctx.start(child.read, missing, 1)
    ctx.expect_fault(MISSING_READ, missing, own)
    own.copy(missing, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([VALUE]))
    for at in (protected, both):
        ctx.expect(f"byte of {at:#x}", ctx.silently(child.read, at, 1), b"\1")
        writing = ctx.start(child.write, at, b"\2")
        ctx.expect_fault(WP_WRITE, at, own)
        own.writeprotect(at, ctx.page, mode=WriteprotectMode(0))
        ctx.expect("write in the child", writing.result(), None)
    ctx.expect_quiet()


@case(
    "fork-descriptor.ranges.minor",
    origin=ORIGIN,
    memory=FILE,
    features=lambda memory: minor_features(memory) | FORK,
)
def minor_inherited(ctx: Context) -> None:
    """A range registered in mode MINOR is registered so in the child."""
    region = ctx.make(1)
    in_page_cache(region, IN_FILE)
    ctx.register(region, MINOR)
    child, own = _child(ctx)
    reading = ctx.start(child.read, region.start, 1)
    ctx.expect_fault(MINOR_READ, region.start, own)
    own.continue_(region.start, ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([IN_FILE]))
    ctx.expect_quiet()


@case(
    "fork-descriptor.ranges.wiped",
    origin="kernel/fork.c: dup_mmap, VM_WIPEONFORK",
    memory=ANON,
    features=missing_wp_features(MEMORY_TYPES["anon"]) | FORK,
)
def wiped(ctx: Context) -> None:
    """Memory with MADV_WIPEONFORK is registered in the child, and its pages are missing there."""
    region = ctx.make(2)
    region.madvise(MADV_WIPEONFORK)
    ctx.register(region, MISSING | WP)
    ctx.uffd.copy(region.start, bytes([1]) * ctx.page)
    ctx.uffd.writeprotect(region.start, ctx.page)
    child, own = _child(ctx)
    for at in (region.start, region.start + ctx.page):
        ctx.expect_pagemap(at, "-----", pid=child.pid)
        reading = ctx.start(child.read, at, 1)
        ctx.expect_fault(MISSING_READ, at, own)
        own.copy(at, bytes([VALUE]) * ctx.page)
        ctx.expect("byte in the child", reading.result(), bytes([VALUE]))
        ctx.expect("a write", ctx.silently(child.write, at, b"\2"), None)
    ctx.expect("byte in the parent", ctx.silently(ctx.read, region.start), b"\1")
    ctx.expect("whether the parent's page is protected", ctx.is_protected(region.start), True)


@case("fork-descriptor.ranges.own", origin=ORIGIN, features=lambda m: missing_features(m) | FORK)
def ranges_own(ctx: Context) -> None:
    """Unregistering in the child does not change the parent's range, nor the reverse."""
    region = ctx.make(2)
    ctx.register(region, MISSING)
    child, own = _child(ctx)
    second = region.start + ctx.page
    own.unregister(region.start, ctx.page)
    ctx.uffd.unregister(second, ctx.page)
    ctx.expect("byte in the child", ctx.silently(child.read, region.start, 1), b"\0")
    ctx.expect("byte in the parent", ctx.silently(ctx.read, second, 1), b"\0")
    # The file now has the pages that the other side has read.
    if ctx.memory.shared or ctx.memory.is_shmem:
        return
    reading = ctx.start(ctx.read, region.start)
    ctx.expect_fault(MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the parent", reading.result(), bytes([VALUE]))
    reading = ctx.start(child.read, second, 1)
    ctx.expect_fault(MISSING_READ, second, own)
    own.copy(second, bytes([VALUE]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([VALUE]))
