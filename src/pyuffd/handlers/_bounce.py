"""Memory through which content goes from a descriptor to pages (layer L4)."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress

from pyuffd import _memory
from pyuffd._closing import SoleOwner
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._owned import Descriptor

# Small enough to stay in a cache between the read and the copy, large enough that a call from
# Python is a hundredth of it.
BOUNCE_SIZE = 1 << 20
_POPULATE_WRITE = 23


class Bounce(SoleOwner):
    """Memory of this process; with `shared` it is a memfd, which another process can map.

    Threads: needs an external lock.
    """

    _instead = "it is memory of one call"
    address: int
    view: memoryview

    def __init__(self, size: int = BOUNCE_SIZE, *, shared: bool = False) -> None:
        self.size = size
        self._memory: mmap.mmap | None = None
        self._views: list[memoryview] = []
        self._file = Descriptor()
        try:
            if shared:
                self._file = Descriptor.memfd("uffd-bounce", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, size)
                self._memory = mmap.mmap(self.fd, size)
            else:
                self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.address, _, self.view = _memory.buffer_address(self._memory)
            self._views.append(self.view)
        except OSError as error:
            self.close()
            raise_errno("memory for what is to be filled in", error.errno or errno.EIO, size=size)
        except BaseException:
            self.close()
            raise
        with suppress(UffdOSError):  # before Linux 5.14
            _memory.madvise(self.address, size, _POPULATE_WRITE)

    @property
    def fd(self) -> int:
        """The memfd, or -1."""
        return self._file.number

    def close(self) -> None:
        """Close the descriptor and unmap the memory, or leave it to the last view of it.

        May be called again.
        """
        self._file.close()
        with suppress(BufferError):  # a traceback or a thread left behind looks at it
            for view in self._views:
                view.release()
            if self._memory is not None:
                self._memory.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()
