"""Direct reads: their buffers are written as they begin, and change as they end."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyuffd import BlindReason, DirtyTracker, Feature, PageRanges, Process, Region, Snapshot
from pyuffd.dirty._tracker import MethodName
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Used
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._mounts import mounted
from tests.kernel.test_pinned_buffers import SQE, Ring, needs_io_uring
from tests.process._hung_files import FUSE, Server, connect
from tests.process.test_snapshot import take

LIMIT_S = 0.5 * SCALE
POLL_ADD, TIMEOUT = 6, 11
IO_SETUP, IO_DESTROY = 206, 207
READER = """
import ctypes, mmap, os, sys
area = mmap.mmap(-1, 8 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = b"\1" * len(area)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    how, buffers = line.split()[0], [memoryview(area)[2 * 4096 : 4 * 4096]]
    fd = int(sys.argv[1])
    print(os.readv(fd, buffers) if how == "readv" else os.preadv(fd, buffers, 0), flush=True)
"""


class Reader:
    """A process that reads two pages of a file into its memory, for as long as we want."""

    def __init__(self, popen: subprocess.Popen[str], server: Server) -> None:
        assert popen.stdout is not None
        self.popen, self.pid, self._server = popen, popen.pid, server
        self.start = int(popen.stdout.readline())
        self.pages = PageRanges.of([(self.start, self.start + 8 * PAGE)])
        self.buffer = PageRanges.of([(self.start + 2 * PAGE, self.start + 4 * PAGE)])

    def begin(self, how: str) -> None:
        self._server.hold()
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{how}\n")
        self.popen.stdin.flush()
        until = time.monotonic() + 10 * SCALE
        while not self._server.holds:
            assert time.monotonic() < until
            time.sleep(0.001)

    def end(self) -> None:
        self._server.hold(on=False)
        assert self.popen.stdout is not None
        assert int(self.popen.stdout.readline()) == 2 * PAGE


@contextmanager
def reader() -> Iterator[Reader]:
    with ExitStack() as stack:
        connection = connect()
        stack.callback(os.close, connection)
        options = {"fd": str(connection), "rootmode": "40000", "user_id": "0", "group_id": "0"}
        folder = stack.enter_context(mounted("fuse", **options))
        server = Server(connection, b"\x55" * 16 * PAGE, direct=True)
        stack.callback(os.waitpid, server.pid, 0)
        stack.callback(os.kill, server.pid, signal.SIGKILL)
        file = os.open(f"{folder}/file", os.O_RDONLY)
        stack.callback(os.close, file)
        popen = subprocess.Popen(
            [sys.executable, "-c", READER, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[file],
        )
        stack.callback(popen.communicate)
        stack.callback(popen.kill)
        stack.callback(server.hold, on=False)
        yield Reader(popen, server)


def rounds(how: str, method: MethodName) -> None:
    with (
        reader() as target,
        Process(target.pid) as process,
        DirtyTracker(process, method=method) as tracker,
    ):
        tracker.collect().commit()
        target.begin(how)
        first = tracker.collect()
        first.commit()
        assert first.written & target.pages == target.buffer
        assert [
            blind.reason for blind in tracker.blind if blind.start == target.buffer[0].start
        ] == [BlindReason.PINNED]
        for _ in range(2):
            with tracker.collect() as still:
                assert still.unsure & target.pages == target.buffer
                still.commit()
        target.end()
        with tracker.collect() as last:
            assert (last.written | last.unsure) & target.pages == target.buffer
            last.commit()
        with tracker.collect() as quiet:
            assert not (quiet.written | quiet.unsure) & target.pages


@needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
@needs(Feature.WP_ASYNC)
@pytest.mark.skipif(not os.path.exists(FUSE), reason="this kernel has no FUSE")
@pytest.mark.parametrize(
    ("how", "method"), [("readv", "wp-async"), ("preadv", "wp-async"), ("readv", "wp-sync")]
)
def test_a_read_under_way_is_unsure(how: str, method: MethodName) -> None:
    run_child(rounds, how, method)


def in_a_snapshot(folder: str) -> None:
    with reader() as target, Process(target.pid) as process:

        def at(name: str) -> None:
            if name == "round 0":
                target.begin("readv")
            elif name == "round 1":
                target.end()

        _capture.barrier = at
        report = Snapshot.take(
            process, f"{folder}/1", method="precopy", durable=False, max_stall_s=LIMIT_S
        )
        with Snapshot.open(report.path) as snapshot:
            content = snapshot.read(target.start, 8 * PAGE)
        assert content[::PAGE] == b"\1\1\x55\x55\1\1\1\1"


@needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
@needs(Feature.WP_ASYNC)
@pytest.mark.skipif(not os.path.exists(FUSE), reason="this kernel has no FUSE")
def test_a_snapshot_has_what_was_read_meanwhile(tmp_path: Path) -> None:
    """By precopy: a round copies the page while the read is under way, and no thread writes it."""
    run_child(in_a_snapshot, str(tmp_path))


FIXED_PAGES = 1024


def fixed_target() -> None:
    """Read two pages into the end of a fixed buffer whenever it is told to."""
    with Region.anonymous(FIXED_PAGES * PAGE) as region, tempfile.TemporaryFile() as file:
        region.fill(1)
        file.write(b"\x55" * 2 * PAGE)
        file.flush()
        ring = Ring()
        ring.pin(region)
        print(region.start, flush=True)
        for _ in sys.stdin:
            at = region.start + region.length - 2 * PAGE
            print(ring.read(file.fileno(), at, 2 * PAGE, fixed=True), flush=True)
        ring.close()


@needs_privilege("CAP_SYS_PTRACE")
@needs_io_uring()
@pytest.mark.parametrize("method", ["cow", "precopy"])
def test_fixed_buffers_are_of_the_instant(
    method: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel writes to them without a fault: they are copied in the stop."""
    popen = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import fixed_target; fixed_target()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )

    def at(name: str) -> None:
        if name == "resumed":
            assert popen.stdin is not None
            assert popen.stdout is not None
            popen.stdin.write("\n")
            popen.stdin.flush()
            assert int(popen.stdout.readline()) == 2 * PAGE

    try:
        assert popen.stdout is not None
        start = int(popen.stdout.readline())
        with Process(popen.pid) as process:
            monkeypatch.setattr(_capture, "barrier", at)
            # The sweep comes to the end of the buffer after a quarter of a second.
            take(process, tmp_path / "1", method=method, rate=16 << 20)
            with Snapshot.open(tmp_path / "1") as snapshot:
                content = snapshot.read(start, FIXED_PAGES * PAGE)
            assert content[::PAGE] == b"\1" * FIXED_PAGES
    finally:
        popen.kill()
        popen.communicate()


def queued(by: str) -> None:
    """Requests that nobody lists may be direct reads only if something is open with O_DIRECT."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        region = stack.enter_context(Region.anonymous(2 * PAGE))
        tracker = stack.enter_context(DirtyTracker(region))

        def pinned() -> bool:
            return any(blind.reason is BlindReason.PINNED for blind in tracker.blind)

        if by == "aio":
            context = ctypes.c_ulong(0)
            assert libc.syscall(IO_SETUP, 8, ctypes.byref(context)) == 0
            stack.callback(libc.syscall, IO_DESTROY, context)
        else:
            ring = Ring()
            stack.callback(ring.close)
            reading, _writing = os.pipe()
            poll = struct.pack(SQE, POLL_ADD, 0, 0, reading, 0, 0, 0)
            ring.submit(poll[:28] + struct.pack("I", select.POLLIN) + poll[32:])
            ring.enter(ring.fd, wait=0)
        assert not pinned()
        file = stack.enter_context(tempfile.NamedTemporaryFile(dir="/var/tmp"))
        direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, direct)
        if by == "ring":
            assert not pinned(), "a request that waits for a pipe reads nothing"
            limit = ctypes.create_string_buffer(struct.pack("qq", 1000, 0))
            ring.submit(struct.pack(SQE, TIMEOUT, 0, 0, -1, 0, ctypes.addressof(limit), 1))
            ring.enter(ring.fd, wait=0)
        assert pinned()
        with tracker.collect() as round_:
            assert round_.unsure.bytes == region.length


@needs(Feature.WP_ASYNC)
def test_requests_of_io_submit() -> None:
    run_child(queued, "aio")


@needs(Feature.WP_ASYNC)
@needs_io_uring()
def test_requests_of_a_ring() -> None:
    run_child(queued, "ring")


def of_a_pipe() -> None:
    """It copies through the page table, whatever it waits for."""
    reading, writing = os.pipe()
    with Region.anonymous(2 * PAGE) as region, DirtyTracker(region) as tracker:
        view = region.memoryview()
        thread = threading.Thread(target=os.readv, args=(reading, [view[:PAGE]]))
        thread.start()
        until = time.monotonic() + 10 * SCALE
        while not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("19 "):
            assert time.monotonic() < until
            time.sleep(0.001)
        with tracker.collect() as round_:
            assert not round_.unsure
            round_.commit()
        os.write(writing, b"x")
        thread.join()
        with tracker.collect() as round_:
            assert round_.written.bytes == PAGE
        view.release()


@needs(Feature.WP_ASYNC)
def test_a_read_of_a_pipe_is_no_direct_read() -> None:
    run_child(of_a_pipe)
