"""What a keeper asks of C so that an engine can have a successor (engine/successor.h; layer L4)."""

from __future__ import annotations

import errno
import logging
import os

from pyuffd._limits import raise_start_error
from pyuffd._shim import ffi, lib
from pyuffd.handlers._engine_calls import pointer_to

log = logging.getLogger(__name__)


def shared_size(fault_log: int) -> int:
    """Return the bytes of memory that outlives an engine (`shared` below)."""
    return int(lib.uffd_engine_shared_size(fault_log))


def follow_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; return False if it has ended."""
    code = lib.uffd_keeper_follow_parent(parent)
    if code and code != -errno.ESRCH:
        raise_start_error("follow the keeper process", -code, "prctl")
    return code == 0


def hold_descriptors(shared: int, keeper: int, sockets: list[int]) -> None:
    """Share this process's descriptors with a new child of the keeper (engine/successor.h)."""
    code = lib.uffd_keeper_hold_descriptors(pointer_to(shared), keeper, sockets, len(sockets))
    if code:
        raise_start_error("make a process that holds descriptors", -code, "clone")


def rescue_forks(shared: int) -> list[int]:
    """Return the descriptors of forks that a dead child had read but not reported."""
    position, fds = ffi.new("uint32_t *"), []
    while (fd := lib.uffd_keeper_rescue_fork(pointer_to(shared), position)) != -errno.ENOENT:
        if fd >= 0:
            fds.append(int(fd))
        else:
            log.error("pyuffd: a fork's descriptor is lost: %s", os.strerror(-fd))
    return fds


def release_holder(shared: int) -> None:
    """End the process that shared a dead child's descriptors."""
    lib.uffd_keeper_release_holder(pointer_to(shared))
