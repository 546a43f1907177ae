"""Writes through fixed buffers of io_uring that were pinned before the protection are not seen.

Registering a buffer pins its pages; READ_FIXED then writes to them past the page table. The README
names this limit. If the buffer is pinned after the protection, or not pinned, all writes are seen.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import tempfile

import pytest

from pyuffd import Feature, Handler, PageState, Region, RegisterMode, Userfaultfd
from pyuffd.testing import needs
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked, needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import states

FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
SETUP, ENTER, REGISTER = 425, 426, 427
REGISTER_BUFFERS, GETEVENTS = 0, 1
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
        sqe = struct.pack("BBHiQQIIQQQQ", op, 0, 0, fd, 0, address, length, 0, 0, 0, 0, 0)
        self._sqes[: len(sqe)] = sqe
        (tail,) = struct.unpack_from("I", self._rings, self._sq[1])
        struct.pack_into("I", self._rings, self._sq[6] + (tail & 7) * 4, 0)
        struct.pack_into("I", self._rings, self._sq[1], tail + 1)
        self._call(ENTER, self.fd, 1, 1, GETEVENTS, None, 0)
        (head,) = struct.unpack_from("I", self._rings, self._cq[0])
        (result,) = struct.unpack_from("i", self._rings, self._cq[5] + (head & 15) * 16 + 8)
        struct.pack_into("I", self._rings, self._cq[0], head + 1)
        return int(result)

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
