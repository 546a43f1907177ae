"""Messages byte by byte: unused bytes are zero, so they leak no kernel memory (layer L5)."""

from __future__ import annotations

import os
import select
import struct

from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import MESSAGE_SIZE
from pyuffd._uffd import Fork, Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANY, missing_features, wp_features
from pyuffd.testing._memory_types import SMALL_PAGE

SYS_MUNMAP, SYS_FORK, SYS_MREMAP, SYS_MADVISE, SYS_KILL, SYS_UNSHARE = 11, 57, 25, 28, 62, 272
CLONE_NEWPID = 0x20000000
MADV_DONTNEED, MREMAP_TO = 4, 3
PAGEFAULT, FORKED, REMAPPED, REMOVED, UNMAPPED = 0x12, 0x13, 0x14, 0x15, 0x16
ORIGIN = "fs/userfaultfd.c: msg_init, userfault_msg"
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
FORK = Feature.EVENT_FORK


def _message(ctx: Context, uffd: Userfaultfd) -> bytes:
    if not select.select([uffd], [], [], WAIT_S)[0]:
        ctx.fail("messages", f"none within {WAIT_S:g} s", "a message")
    return os.read(uffd.fileno(), MESSAGE_SIZE)


def _fault(flags: int, address: int, thread: int) -> bytes:
    return struct.pack("=B7xQQI4x", PAGEFAULT, flags, address, thread)


def _expect(ctx: Context, what: str, seen: bytes, wanted: bytes) -> None:
    ctx.expect(f"bytes of {what}", seen.hex(" "), wanted.hex(" "))


@case(
    "read.ok.bytes-of-a-fault",
    origin=ORIGIN,
    features=lambda memory: missing_features(memory) | wp_features(memory) | Feature.THREAD_ID,
)
def fault_bytes(ctx: Context) -> None:
    """The message of a fault has its flags, address and thread, and zeros elsewhere."""
    region = ctx.make(1)
    for features in (ctx.case.features_on(ctx.memory), missing_features(ctx.memory)):
        uffd = ctx.open(features | wp_features(ctx.memory))
        uffd.register(region, mode=MISSING | WP)
        write = ctx.start(ctx.write, region.start + ctx.page - 1, b"\1")
        thread = write.thread_id if features & Feature.THREAD_ID else 0
        _expect(ctx, "a missing page", _message(ctx, uffd), _fault(1, region.start, thread))
        uffd.copy(region.start, bytes(ctx.page))
        ctx.expect("the write", write.result(), None)
        uffd.writeprotect(region)
        write = ctx.start(ctx.write, region.start, b"\1")
        thread = write.thread_id if features & Feature.THREAD_ID else 0
        _expect(ctx, "a protected page", _message(ctx, uffd), _fault(3, region.start, thread))
        uffd.close()
        ctx.expect("the write", write.result(), None)
        region = ctx.make(1)


EVENTS = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


@case("read.ok.bytes-of-an-event", origin=ORIGIN, memory=ANY, features=EVENTS | FORK)
def event_bytes(ctx: Context) -> None:
    """The message of an event has its fields, and zeros elsewhere."""
    region, target = ctx.make(3, "anon"), ctx.make(1, "anon")
    ctx.register(region, MISSING)
    reading = ctx.start(_message, ctx, ctx.uffd)
    child = ctx.fork_only()
    seen = reading.result()
    (fd,) = struct.unpack_from("=I", seen, 8)
    uffd = Userfaultfd.from_fd(fd)
    ctx.callback(uffd.close)
    _expect(ctx, "a fork", seen, struct.pack("=B7xI20x", FORKED, fd))
    page, start = SMALL_PAGE, region.start
    calls: tuple[tuple[str, tuple[int, ...], list[bytes]], ...] = (
        (
            "MADV_DONTNEED",
            (SYS_MADVISE, start, page, MADV_DONTNEED),
            [struct.pack("=B7xQQ8x", REMOVED, start, start + page)],
        ),
        (
            "munmap",
            (SYS_MUNMAP, start, page),
            [struct.pack("=B7xQQ8x", UNMAPPED, start, start + page)],
        ),
        (
            "mremap",
            (SYS_MREMAP, start + 2 * page, page, page, MREMAP_TO, target.start),
            [
                struct.pack("=B7xQQQ", REMAPPED, start + 2 * page, target.start, page),
                struct.pack("=B7xQQ8x", UNMAPPED, start + 2 * page, start + 3 * page),
            ],
        ),
    )
    for name, words, wanted in calls:
        call = ctx.start(child.syscall, *words)
        for message in wanted:
            _expect(ctx, name, _message(ctx, uffd), message)
        ctx.expect(f"whether {name} succeeded", call.result() >= 0, True)


@case(
    "read.ok.thread-id-in-namespace",
    origin="fs/userfaultfd.c: task_pid_vnr",
    memory=ANY,
    features=FORK | Feature.THREAD_ID,
)
def thread_in_namespace(ctx: Context) -> None:
    """A message has the thread's ID in the PID namespace of the thread."""
    region = ctx.make(1, "anon")
    ctx.register(region, MISSING)
    child = ctx.fork()
    uffd = child.uffd
    assert uffd is not None
    if child.syscall(SYS_UNSHARE, CLONE_NEWPID):
        ctx.lack("pid-namespace", "unshare(CLONE_NEWPID) is refused")
    forking = ctx.start(child.hand_on)
    own = ctx.expect_event(Fork, uffd).uffd
    ctx.callback(own.close)
    forking.result()
    reading = ctx.start(child.read, region.start, 1)
    _expect(ctx, "a fault of process 1", _message(ctx, own), _fault(0, region.start, 1))
    own.copy(region.start, b"\7" * SMALL_PAGE)
    ctx.expect("the byte", reading.result(), b"\7")


# Ways to read


@case(
    "read.ok.into-parts",
    origin="fs/userfaultfd.c: userfaultfd_read_iter",
    memory=ANY,
    variants=[
        Variant("whole", "a message may span several buffers"),
        Variant("refused", "EINVAL: each buffer must hold a message", lacks=Feature.MOVE),
    ],
)
def into_parts(ctx: Context) -> None:
    """A readv(2) may spread a message over its buffers."""
    region = ctx.make(1, "anon")
    ctx.register(region, MISSING)
    write = ctx.start(ctx.write, region.start, b"\1")
    ctx.wait_readable()
    parts = [bytearray(8), bytearray(24)]
    try:
        seen = os.readv(ctx.uffd.fileno(), parts)
    except OSError as error:
        ctx.expect_variant("errno of readv", error.errno, refused=22)
    else:
        ctx.expect_variant("bytes read", seen, whole=MESSAGE_SIZE)
        _expect(ctx, "the message", b"".join(parts), _fault(1, region.start, 0))
    ctx.uffd.copy(region.start, bytes(SMALL_PAGE))
    ctx.expect("the write", write.result(), None)


@case(
    "read.EAGAIN.nowait",
    origin="fs/userfaultfd.c: userfaultfd_read_iter, IOCB_NOWAIT",
    memory=ANY,
    variants=[
        Variant("told", "EAGAIN, as if the descriptor were O_NONBLOCK"),
        Variant("refused", "EOPNOTSUPP"),
    ],
)
def nowait(ctx: Context) -> None:
    """With RWF_NOWAIT, a read of an empty queue does not wait, also on a blocking descriptor."""
    region = ctx.make(1, "anon")
    ctx.register(region, MISSING)
    os.set_blocking(ctx.uffd.fileno(), True)
    buffer = bytearray(MESSAGE_SIZE)

    def read() -> int:
        try:
            return os.preadv(ctx.uffd.fileno(), [buffer], -1, os.RWF_NOWAIT)
        except OSError as error:
            return -(error.errno or 5)

    reading = ctx.start(read)
    ctx.expect_variant("result of preadv2", reading.result(), told=-11, refused=-95)
    os.set_blocking(ctx.uffd.fileno(), False)
    if ctx.variant == "refused":
        return
    write = ctx.start(ctx.write, region.start, b"\1")
    ctx.wait_readable()
    ctx.expect("bytes read", read(), MESSAGE_SIZE)
    _expect(ctx, "the message", bytes(buffer), _fault(1, region.start, 0))
    ctx.uffd.copy(region.start, bytes(SMALL_PAGE))
    ctx.expect("the write", write.result(), None)
