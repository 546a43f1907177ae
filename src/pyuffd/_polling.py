"""Wait for descriptors, whatever RLIMIT_NOFILE is (layer L1).

poll(2), and with it `select.poll`, fails with EINVAL for more descriptors than RLIMIT_NOFILE. A
program may lower that limit while its descriptors stay open, to 0 for example as it enters a
sandbox.
"""

from __future__ import annotations

import errno
import math
import time
from typing import Protocol

from pyuffd._errors import raise_errno
from pyuffd._shim import ffi, lib

# The longest wait that fits an int of milliseconds; what waits longer waits again.
LONGEST_MS = (1 << 31) - 1


class HasFileno(Protocol):
    """A socket, a file or another object with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor."""


class Poll:
    """As `select.poll`, with the few methods that are needed here."""

    def __init__(self) -> None:
        self._wanted: dict[int, int] = {}

    def register(self, what: HasFileno | int, events: int) -> None:
        """Wait for these events of a descriptor too."""
        fd = what if isinstance(what, int) else what.fileno()
        if fd < 0:
            raise ValueError(f"{what!r} is closed")
        self._wanted[fd] = events

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        """Return the descriptors that are ready, with their events; [] when the time is over.

        Signal handlers of Python run meanwhile, and what they raise is raised.
        """
        fds = ffi.new("int32_t[]", list(self._wanted))
        give_up = math.inf if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        while True:
            events = ffi.new("int16_t[]", list(self._wanted.values()))
            left_ms = (give_up - time.monotonic()) * 1000
            limit = -1 if left_ms == math.inf else min(max(math.ceil(left_ms), 0), LONGEST_MS)
            ready = lib.uffd_transfer_poll(fds, events, len(self._wanted), limit)
            if ready > 0:
                return [(fd, found) for fd, found in zip(fds, events, strict=True) if found]
            if ready < 0 and ready != -errno.EINTR:
                raise_errno("poll", -ready)
            if time.monotonic() >= give_up:
                return []
