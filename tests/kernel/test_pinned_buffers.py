"""Writes through fixed buffers of io_uring that were pinned before the protection are not seen.

Registering a buffer pins its pages; READ_FIXED then writes to them past the page table. The README
names this limit. If the buffer is pinned after the protection, or not pinned, all writes are seen.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import tempfile
from contextlib import suppress

import pytest

from pyuffd import (
    BlindReason,
    DirtyTracker,
    Feature,
    Handler,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._need import Lack, Need
from pyuffd.testing._needs import marked, needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import states

FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
SETUP, ENTER, REGISTER = 425, 426, 427
REGISTER_BUFFERS, GETEVENTS = 0, 1
REGISTER_RING_FDS, REGISTERED_RING = 20, 16
NO_MMAP = 1 << 14
SQE = "BBHiQQI28x"
READ_FIXED, READ = 4, 22
SQES_AT = 0x10000000
PAGES = 8
WRITTEN = [2, 3]


class Ring:
    """The part of io_uring that one request at a time needs."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        params = ctypes.create_string_buffer(120)
        self.fd = self._call(SETUP, 8, params)
        words = struct.unpack("30I", params.raw)
        self._sq, self._cq = words[10:20], words[20:30]
        length = max(self._sq[6] + words[0] * 4, self._cq[5] + words[1] * 16)
        self._rings = mmap.mmap(self.fd, length, mmap.MAP_SHARED)
        self._sqes = mmap.mmap(self.fd, words[0] * 64, mmap.MAP_SHARED, offset=SQES_AT)

    def _call(self, number: int, *args: object) -> int:
        result = int(self._libc.syscall(number, *args))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def pin(self, region: Region) -> None:
        """Register the region as fixed buffer 0."""
        vector = ctypes.create_string_buffer(struct.pack("QQ", region.start, region.length))
        self._call(REGISTER, self.fd, REGISTER_BUFFERS, vector, 1)

    def read(self, fd: int, address: int, length: int, *, fixed: bool) -> int:
        """Read the start of a file into memory; return the number of bytes, or -errno."""
        op = READ_FIXED if fixed else READ
        self.submit(struct.pack(SQE, op, 0, 0, fd, 0, address, length))
        self.enter(self.fd)
        (head,) = struct.unpack_from("I", self._rings, self._cq[0])
        (result,) = struct.unpack_from("i", self._rings, self._cq[5] + (head & 15) * 16 + 8)
        struct.pack_into("I", self._rings, self._cq[0], head + 1)
        return int(result)

    def submit(self, sqe: bytes) -> None:
        """Queue a request."""
        self._sqes[: len(sqe)] = sqe
        (tail,) = struct.unpack_from("I", self._rings, self._sq[1])
        struct.pack_into("I", self._rings, self._sq[6] + (tail & 7) * 4, 0)
        struct.pack_into("I", self._rings, self._sq[1], tail + 1)

    def enter(self, ring: int, flags: int = 0, *, wait: int = 1) -> int:
        """Submit one request to the kernel, and wait for the end of `wait` requests."""
        return self._call(ENTER, ring, 1, wait, GETEVENTS | flags, None, 0)

    def hide(self) -> int:
        """Give the ring a number instead of its descriptors; return it."""
        update = ctypes.create_string_buffer(struct.pack("IIQ", 2**32 - 1, 0, self.fd), 16)
        assert self._call(REGISTER, self.fd, REGISTER_RING_FDS, update, 1) == 1
        inode = os.fstat(self.fd).st_ino
        for name in os.listdir("/proc/self/fd"):  # mmap keeps copies
            with suppress(OSError):
                if os.fstat(int(name)).st_ino == inode:
                    os.close(int(name))
        return int(struct.unpack("IIQ", update.raw)[0])

    def close(self) -> None:
        """Unpin, and close."""
        self._rings.close()
        self._sqes.close()
        os.close(self.fd)


def needs_io_uring() -> pytest.MarkDecorator:
    """Skip if a sysctl, a seccomp filter or the kernel's configuration forbids io_uring."""

    def missing() -> tuple[list[str], str]:
        try:
            Ring().close()
        except OSError as error:
            return ["io_uring"], str(error)
        return [], ""

    return marked(Need("io_uring", missing))


def read_into(pinned: str) -> None:
    ring = Ring()
    with (
        tempfile.TemporaryFile() as file,
        Userfaultfd(features=FEATURES) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd) as handler,
    ):
        file.write(b"f" * 2 * PAGE)
        file.flush()
        region.fill(1)
        old = bytearray(region.length)
        if pinned == "before":
            ring.pin(region)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=old)
        handler.writeprotect(region)
        if pinned == "after":
            ring.pin(region)
        at = region.start + 2 * PAGE
        assert ring.read(file.fileno(), at, 2 * PAGE, fixed=pinned != "not") == 2 * PAGE
        assert region.read(2 * PAGE, 2 * PAGE) == b"f" * 2 * PAGE
        dirty = [page for page, state in enumerate(states(handler, region)) if state == DIRTY]
        handler.preserve(region)
        kept = [page for page in range(PAGES) if old[page * PAGE] == 1]
        if pinned == "before":
            assert dirty == []
            assert kept == [page for page in range(PAGES) if page not in WRITTEN]
        else:
            assert {*WRITTEN} <= {*dirty}
            assert kept == [*range(PAGES)]
        ring.close()


DIRTY = PageState.DIRTY


@needs_kernel_faults()
@needs(FEATURES)
@needs_io_uring()
@pytest.mark.parametrize("pinned", ["before", "after", "not"])
def test_read_into(pinned: str) -> None:
    run_child(read_into, pinned)


def tracked_without_descriptor(shown_too: bool) -> None:
    """A ring that is known by its number, and has no descriptor any more, pins and writes."""
    other = Ring()
    with (
        tempfile.TemporaryFile() as file,
        Region.anonymous(PAGES * PAGE) as region,
        Region.anonymous(PAGES * PAGE) as beside,
    ):
        file.write(b"f" * PAGE)
        file.flush()
        region.fill(1)
        beside.fill(1)
        ring = Ring()
        ring.pin(region)
        number = ring.hide()
        if shown_too:
            other.pin(beside)
        with DirtyTracker(region) as tracker:
            tracker.collect().commit()
            ring.submit(struct.pack(SQE, READ_FIXED, 0, 0, file.fileno(), 0, region.start, PAGE))
            assert ring.enter(number, REGISTERED_RING) == 1
            assert region.read(0, 2) == b"ff"
            pinned = [b for b in tracker.blind if b.reason is BlindReason.PINNED]
            assert any(b.start <= region.start < b.end for b in pinned)
            with tracker.collect() as round_:
                both = round_.written | round_.unsure
                assert both.bytes_in([(region.start, region.start + PAGE)]) == [PAGE]
                round_.commit()


def tracked_in_huge_pages() -> None:
    """What counts as a huge page is no buffer that nobody shows."""
    with Region.anonymous(4 << 20) as region:
        region.madvise(mmap.MADV_HUGEPAGE)
        region.fill(1)
        ring = Ring()
        ring.pin(region)
        with DirtyTracker(region) as tracker:
            (pin,) = (b for b in tracker.blind if b.reason is BlindReason.PINNED)
            assert (pin.start, pin.length) == (region.start, region.length)
        ring.close()


def queues_of_ones_own() -> None:
    """The kernel writes what is completed to memory that no buffer is registered of."""
    with Region.anonymous(4 * PAGE) as region, Region.anonymous(PAGE) as other:
        region.fill(0)
        params = bytearray(120)
        struct.pack_into("I", params, 8, NO_MMAP)
        struct.pack_into("Q", params, 72, region.start + 2 * PAGE)
        struct.pack_into("Q", params, 112, region.start)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(SETUP, 8, (ctypes.c_char * len(params)).from_buffer(params))
        if fd < 0:
            assert ctypes.get_errno() == errno.EINVAL
            raise Lack(
                ["io_uring"], "io_uring_setup: IORING_SETUP_NO_MMAP (Linux 6.5) is not known"
            )
        with DirtyTracker([region, other]) as tracker:
            assert any(blind.reason is BlindReason.PINNED for blind in tracker.blind)
            tracker.collect().commit()
            os.close(fd)
            with tracker.collect() as round_:
                assert round_.unsure.bytes == 5 * PAGE, "it was pinned as the last round ended"
                round_.commit()
            with tracker.collect() as round_:
                assert not round_.unsure
        with DirtyTracker(region) as tracker:
            assert not any(blind.reason is BlindReason.PINNED for blind in tracker.blind)


@needs(Feature.WP_ASYNC)
@needs_io_uring()
def test_queues_in_memory_of_ones_own_are_noticed() -> None:
    run_child(queues_of_ones_own)


@needs(Feature.WP_ASYNC)
@needs_io_uring()
@pytest.mark.parametrize("shown_too", [False, True], ids=["alone", "beside-another"])
def test_a_ring_without_a_descriptor_is_noticed(shown_too: bool) -> None:
    run_child(tracked_without_descriptor, shown_too)


@needs(Feature.WP_ASYNC)
@needs_io_uring()
def test_huge_pages_are_no_hidden_buffers() -> None:
    run_child(tracked_in_huge_pages)
