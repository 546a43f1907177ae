"""read(2), poll(2) and fdinfo of a userfaultfd, and what wakes a thread (layer L5)."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import select
import time
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import CopyMode, Feature, Ioctl, RegisterMode, WriteprotectMode
from pyuffd._events import MESSAGE_SIZE
from pyuffd._memory import Interrupted
from pyuffd._uffd import Event, Fork, Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Access, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._types import ANY, missing_features, wp_features
from pyuffd.conformance.cases.errno_open import API, FLAGS
from pyuffd.regions import Region
from pyuffd.testing import _opening
from pyuffd.testing._need import needs_kernel_faults

INITIALIZED = 1 << 31  # UFFD_FEATURE_INITIALIZED, the kernel's own
MISSING_WRITE, WP_WRITE = 1, 3
SYS_READ = 0
PROT_NONE = 0


def _poll(fd: int | Userfaultfd) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ready = poll.poll(0)
    return ready[0][1] if ready else 0


def counters(uffd: Userfaultfd) -> tuple[int, int]:
    """Return the counts in fdinfo: faults that nobody has read, and threads that wait."""
    text = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
    found = re.search(r"pending:\t(\d+)\ntotal:\t(\d+)\n", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _wait_for(ctx: Context, uffd: Userfaultfd, messages: int) -> None:
    """Read this many messages, so that as many threads wait to be woken."""
    for _ in range(messages):
        ctx.expect_fault(MISSING_WRITE, uffd=uffd)


@case("read.EINVAL.before-api", origin="userfaultfd(2): Reading", memory=ANY)
def read_before(ctx: Context) -> None:
    """Before the handshake, read fails with EINVAL and poll reports POLLERR."""
    fd = _opening.open_userfaultfd(FLAGS)
    ctx.callback(os.close, fd)
    ctx.expect_errno(errno.EINVAL, os.read, fd, MESSAGE_SIZE)
    ctx.expect("poll before the handshake", _poll(fd), select.POLLERR)


@case("read.EAGAIN.nothing-queued", origin="userfaultfd(2): Reading", memory=ANY)
def read_empty(ctx: Context) -> None:
    """A non-blocking read of an empty queue fails with EAGAIN, and poll reports nothing."""
    uffd = ctx.open()
    ctx.expect_errno(errno.EAGAIN, os.read, uffd.fileno(), MESSAGE_SIZE)
    ctx.expect("poll of an empty queue", _poll(uffd), 0)


@case("poll.POLLERR.blocking", origin="userfaultfd(2): poll", memory=ANY)
def poll_blocking(ctx: Context) -> None:
    """On a descriptor without O_NONBLOCK, poll reports POLLERR."""
    fd = _opening.open_userfaultfd(os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    ctx.expect("errno of the handshake", ctx.ioctl("API", API, uffd=fd).errno, 0)
    ctx.expect("poll of a blocking descriptor", _poll(fd), select.POLLERR)


@case("read.EINVAL.buffer-small", origin="userfaultfd(2): Reading", features=missing_features)
def read_small(ctx: Context) -> None:
    """A read with too small a buffer fails with EINVAL, and the message stays queued."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.start(ctx.write, region.start, b"\1")
    ctx.wait_readable()
    ctx.expect("poll with a message", _poll(ctx.uffd), select.POLLIN)
    ctx.expect_errno(errno.EINVAL, os.read, ctx.uffd.fileno(), MESSAGE_SIZE - 1)
    ctx.expect_fault(MISSING_WRITE, region.start)


@case("read.ok.whole-messages", origin="userfaultfd(2): Reading", features=missing_features)
def read_whole(ctx: Context) -> None:
    """A read returns whole messages only: all that are queued, or as many as fit."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.MISSING)
    for index in range(2):
        ctx.start(ctx.write, region.start + index * ctx.page, b"\1")
    _wait_pending(ctx, 2)
    fd = ctx.uffd.fileno()
    ctx.expect("read(40)", len(os.read(fd, MESSAGE_SIZE + 8)), MESSAGE_SIZE)
    ctx.uffd.wake(region)  # the thread whose message was read faults again
    _wait_pending(ctx, 2)
    ctx.expect("read(4096)", len(os.read(fd, 4096)), 2 * MESSAGE_SIZE)
    ctx.expect_errno(errno.EAGAIN, os.read, fd, 4096)


def _wait_pending(ctx: Context, count: int) -> None:
    """Wait until this many faults are queued. Poll cannot tell: it reports only the first."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if counters(ctx.uffd)[0] == count:
            return
        os.sched_yield()
    ctx.fail("pending and total in fdinfo", counters(ctx.uffd), count)


@case("fdinfo.ok.api", origin="fs/userfaultfd.c: userfaultfd_show_fdinfo", memory=ANY)
def fdinfo_api(ctx: Context) -> None:
    """/proc/PID/fdinfo/FD shows the API version, the enabled features and the ioctls."""
    asked = Feature(ctx.offered) & (Feature.SIGBUS | Feature.THREAD_ID)
    uffd = ctx.open(asked)
    text = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
    found = re.search(r"^API:\t([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)$", text, re.MULTILINE)
    if found is None:
        ctx.fail("fdinfo", text, "a line that starts with API:")
    ctx.expect("API version in fdinfo", int(found[1], 16), API)
    # Newer kernels keep a bit of their own among the enabled features.
    ctx.expect("enabled features in fdinfo", int(found[2], 16) & ~INITIALIZED, int(asked))
    ctx.expect("API in the ioctls", int(found[3], 16) & Ioctl.API, int(Ioctl.API))


@case(
    "fdinfo.ok.counters",
    origin="fs/userfaultfd.c: userfaultfd_show_fdinfo",
    features=missing_features,
)
def fdinfo_counters(ctx: Context) -> None:
    """/proc/PID/fdinfo/FD counts the faults that nobody has read, and all threads that wait."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.expect("pending and total before the fault", counters(ctx.uffd), (0, 0))
    access = ctx.start(ctx.write, region.start, b"\1")
    ctx.wait_readable()
    ctx.expect("pending and total before the message is read", counters(ctx.uffd), (1, 1))
    ctx.expect_fault(MISSING_WRITE, region.start)
    ctx.expect("pending and total after the message is read", counters(ctx.uffd), (0, 1))
    ctx.uffd.copy(region.start, bytes(ctx.page))
    ctx.expect("pending and total after COPY", counters(ctx.uffd), (0, 0))
    access.result()


def _stalled(ctx: Context, pages: int = 1) -> tuple[Region, list[Access[Interrupted | None]]]:
    """Register for missing faults, start a write to each page, and read the messages."""
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.MISSING)
    writes = [
        ctx.start(ctx.write, region.start + index * ctx.page, b"\1") for index in range(pages)
    ]
    _wait_for(ctx, ctx.uffd, pages)
    ctx.expect("pending and total after the reads", counters(ctx.uffd), (0, pages))
    return region, writes


def _expect_awake(ctx: Context, *writes: Access[Interrupted | None]) -> None:
    ctx.expect("pending and total after the wake", counters(ctx.uffd), (0, 0))
    for write in writes:
        ctx.expect("the write", write.result(), None)
    ctx.expect_quiet()


@case("UFFDIO_COPY.ok.wakes-range", origin="UFFDIO_COPY(2const)", features=missing_features)
def copy_wakes(ctx: Context) -> None:
    """A COPY of several pages wakes every thread that waits for one of them."""
    region, writes = _stalled(ctx, 2)
    ctx.uffd.copy(region.start, bytes(region.length))
    _expect_awake(ctx, *writes)


@case("UFFDIO_COPY.ok.dontwake", origin="UFFDIO_COPY(2const)", features=missing_features)
def copy_dontwake(ctx: Context) -> None:
    """COPY with DONTWAKE fills the page and leaves its thread asleep until UFFDIO_WAKE."""
    region, writes = _stalled(ctx)
    ctx.uffd.copy(region.start, bytes(ctx.page), mode=CopyMode.DONTWAKE)
    ctx.expect("pending and total after COPY with DONTWAKE", counters(ctx.uffd), (0, 1))
    ctx.uffd.wake(region)
    _expect_awake(ctx, *writes)


@case("UFFDIO_WAKE.ok.unresolved", origin="UFFDIO_WAKE(2const)", features=missing_features)
def wake_unresolved(ctx: Context) -> None:
    """A thread woken while its page is still missing faults again and sends a second message."""
    region, writes = _stalled(ctx)
    ctx.uffd.wake(region)
    ctx.expect_fault(MISSING_WRITE, region.start)
    ctx.uffd.copy(region.start, bytes(ctx.page))
    _expect_awake(ctx, *writes)


@case("UFFDIO_UNREGISTER.ok.wakes", origin="UFFDIO_UNREGISTER(2const)", features=missing_features)
def unregister_wakes(ctx: Context) -> None:
    """UNREGISTER wakes the threads that wait; their pages are filled with zeros."""
    region, writes = _stalled(ctx)
    ctx.uffd.unregister(region)
    _expect_awake(ctx, *writes)
    ctx.expect("bytes after UNREGISTER", ctx.read(region.start, 4), b"\1\0\0\0")


@case("close.ok.wakes", origin="userfaultfd(2)", features=missing_features)
def close_wakes(ctx: Context) -> None:
    """The last close wakes the threads that wait; their pages are filled with zeros."""
    region, (write,) = _stalled(ctx)
    ctx.uffd.close()
    ctx.expect("the write", write.result(), None)
    ctx.expect("bytes after the close", ctx.read(region.start, 4), b"\1\0\0\0")


def _stalled_on_protection(ctx: Context) -> tuple[Region, Access[Interrupted | None]]:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    ctx.uffd.writeprotect(region)
    write = ctx.start(ctx.write, region.start, b"\2")
    ctx.expect_fault(WP_WRITE, region.start)
    return region, write


@case("UFFDIO_WRITEPROTECT.ok.wakes", origin="UFFDIO_WRITEPROTECT(2const)", features=wp_features)
def unprotect_wakes(ctx: Context) -> None:
    """Removing the protection wakes the thread that waits to write."""
    region, write = _stalled_on_protection(ctx)
    ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
    _expect_awake(ctx, write)


@case("UFFDIO_WRITEPROTECT.ok.dontwake", origin="UFFDIO_WRITEPROTECT(2const)", features=wp_features)
def unprotect_dontwake(ctx: Context) -> None:
    """Removing the protection with DONTWAKE leaves the thread asleep until UFFDIO_WAKE."""
    region, write = _stalled_on_protection(ctx)
    ctx.uffd.writeprotect(region, mode=WriteprotectMode.DONTWAKE)
    ctx.expect("pending and total after DONTWAKE", counters(ctx.uffd), (0, 1))
    ctx.uffd.wake(region)
    _expect_awake(ctx, write)


@case("UFFDIO_WAKE.ok.still-protected", origin="UFFDIO_WAKE(2const)", features=wp_features)
def wake_protected(ctx: Context) -> None:
    """A thread woken while its page is still protected faults again and sends a second message."""
    region, write = _stalled_on_protection(ctx)
    ctx.uffd.wake(region)
    ctx.expect_fault(WP_WRITE, region.start)
    ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
    _expect_awake(ctx, write)


@case("read.EFAULT.buffer", origin="fs/userfaultfd.c: userfaultfd_read", features=missing_features)
def read_bad_buffer(ctx: Context) -> None:
    """A read into read-only memory is EFAULT; the message is lost until its thread is woken."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    write = ctx.start(ctx.write, region.start, b"\1")
    ctx.wait_readable()
    buffer = ctx.make(1, "anon")
    _memory.mprotect(buffer.start, buffer.length, PROT_NONE)
    seen = syscall(SYS_READ, ctx.uffd.fileno(), buffer.start, MESSAGE_SIZE)
    ctx.expect("result of read(2)", seen, -errno.EFAULT)
    ctx.expect("pending and total after the read", counters(ctx.uffd), (0, 1))
    ctx.expect_quiet()
    ctx.uffd.wake(region)
    ctx.expect_fault(MISSING_WRITE, region.start)
    ctx.uffd.copy(region.start, bytes(ctx.page))
    ctx.expect("the write", write.result(), None)


@case(
    "read.EMFILE.fork-event",
    origin="fs/userfaultfd.c: resolve_userfault_fork",
    features=lambda memory: missing_features(memory) | Feature.EVENT_FORK,
)
def read_fork_emfile(ctx: Context) -> None:
    """At RLIMIT_NOFILE, reading a Fork event fails with EMFILE, and the event stays queued."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    reader = ctx.start(_read_at_descriptor_limit, ctx)
    ctx.fork_only()
    seen, event = reader.result()
    ctx.expect("read at the limit", seen, -errno.EMFILE)
    if not isinstance(event, Fork):
        ctx.fail("the event", event, "Fork")
    with event.uffd as uffd:
        answer = ctx.ioctl("UNREGISTER", region.start, ctx.page, uffd=uffd.fileno())
        ctx.expect("errno of UNREGISTER in the child", answer.errno, 0)


def _read_at_descriptor_limit(ctx: Context) -> tuple[int, Event]:
    """Read the event of a fork without a free descriptor, then with one."""
    ctx.wait_readable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = ctypes.create_string_buffer(MESSAGE_SIZE)
    words = (SYS_READ, ctx.uffd.fileno(), ctypes.addressof(message), MESSAGE_SIZE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        seen = syscall(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (event,) = ctx.uffd.read_events(1)
    return seen, event


@case(
    "read.ok.thread-id",
    origin="UFFDIO_API(2const): UFFD_FEATURE_THREAD_ID",
    features=lambda memory: missing_features(memory) | Feature.THREAD_ID,
)
def read_thread_id(ctx: Context) -> None:
    """With THREAD_ID a message has the ID of the thread that faulted; without it, 0."""
    for features in (ctx.case.features_on(ctx.memory), missing_features(ctx.memory)):
        uffd = ctx.open(features)
        region = ctx.make(1)
        uffd.register(region, mode=RegisterMode.MISSING)
        write = ctx.start(ctx.write, region.start, b"\1")
        fault = ctx.expect_fault(MISSING_WRITE, region.start, uffd)
        wanted = write.thread_id if features & Feature.THREAD_ID else 0
        ctx.expect("thread of the message", fault.thread_id or 0, wanted)
        uffd.copy(region.start, bytes(ctx.page))
        ctx.expect("the write", write.result(), None)


@case(
    "UFFDIO_COPY.ok.src-missing",
    origin="fs/userfaultfd.c, mm/userfaultfd.c",
    features=missing_features,
    needs=[needs_kernel_faults()],
)
def copy_from_missing(ctx: Context) -> None:
    """COPY from a source that is registered and missing waits until the source is filled."""
    region, source = ctx.make(1), ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    second = ctx.open()
    second.register(source, mode=RegisterMode.MISSING)
    copy = ctx.start(ctx.ioctl, "COPY", region.start, source.start, ctx.page)
    ctx.expect_fault(0, source.start, second)
    ctx.expect("whether COPY returned before its source was filled", copy.done, False)
    second.copy(source.start, b"\5" * ctx.page)
    answer = copy.result()
    ctx.expect("errno and result of COPY", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect("content", ctx.read(region.start, 8), b"\5" * 8)
