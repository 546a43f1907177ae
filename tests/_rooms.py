"""Places in the address space where the kernel maps nothing unless it is asked to.

Memory that a test unmaps or moves away leaves a hole. Anywhere else the mapping of another thread
may be placed in it, such as a large block of malloc(), and is lost when the test unmaps what it
mapped.
"""

from __future__ import annotations

import itertools
import mmap
import os

from pyuffd import Region, _memory
from pyuffd.testing import MemoryType

MAP_FIXED_NOREPLACE = 0x100000
PROT_NONE = 0
SIZE = 64 << 20
# The sanitizers allow memory here, above every program's own. The kernel maps downwards from far
# above, so no mapping is placed in a hole here by chance.
_STARTS = itertools.count(0x5660_0000_0000, SIZE)


def map_in_room(length: int, prot: int, flags: int, fd: int = -1) -> int:
    """mmap(2) in a room of its own, in which the mapping may grow; return the address."""
    assert length <= SIZE
    return _memory.mmap(length, prot, flags | MAP_FIXED_NOREPLACE, fd, address=next(_STARTS))


def room(length: int) -> int:
    """Reserve a room, to move memory to or to map it there; return the address."""
    return map_in_room(length, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def region_in_room(of: MemoryType, length: int) -> Region:
    """Map memory of some type in a room; whoever asks for it has to unmap it."""
    with of.make(length) as model:
        fd = -1 if model.fd is None else os.dup(model.fd)
    try:
        flags = mmap.MAP_SHARED if of.shared else mmap.MAP_PRIVATE
        if fd < 0:
            flags |= mmap.MAP_ANONYMOUS
        start = map_in_room(length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)
    finally:
        if fd >= 0:
            os.close(fd)
    return Region.at(start, length, of.page_size)
