"""Files as memory: open them, find their kind and size, and check that they can be mapped."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyuffd import _memory
from pyuffd._arguments import check_path
from pyuffd._errors import UffdPermissionError, raise_errno
from pyuffd._open_files import check_open_file
from pyuffd._owned import Descriptor, FileName
from pyuffd._pages import PAGE_SIZE
from pyuffd._source_files import HUGETLBFS_MAGIC, name_of
from pyuffd.regions._mapping import RegionKind

TMPFS_MAGIC = 0x01021994
SHM_FOLDER = "/dev/shm"
NAME_MAX = 255
NEW_FILE_MODE = 0o600
F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in the fcntl module
STAT_BLOCK = 512  # the unit of st_blocks on every file system


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return the descriptor."""


FileLike = int | str | os.PathLike[str] | HasFileno


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What must be known of an open file to map it; sizes in bytes."""

    kind: RegionKind
    page_size: int
    size: int
    in_memory: bool  # tmpfs or hugetlbfs: even reading a hole allocates memory


def facts(fd: int) -> FileFacts:
    """Return what is known of an open file; raise ValueError unless it is a regular file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{describe(fd)} is not a regular file")
    magic, block_size = _memory.fstatfs(fd)
    huge = magic == HUGETLBFS_MAGIC
    if describe(fd).startswith("/memfd:"):
        kind = RegionKind.MEMFD
    else:
        kind = RegionKind.HUGETLBFS if huge else RegionKind.FILE
    return FileFacts(
        kind, block_size if huge else PAGE_SIZE, status.st_size, huge or magic == TMPFS_MAGIC
    )


def describe(fd: int) -> str:
    """Return the kernel's name of an open file."""
    return name_of(fd)


def own(file: FileLike, *, writable: bool) -> Descriptor:
    """Return a new descriptor for a path, or a duplicate of an open one."""
    if isinstance(file, (str, os.PathLike)):
        check_path("file", file)
        if stat.S_ISFIFO(os.stat(file).st_mode):  # opening it would block until a writer comes
            raise ValueError(f"{os.fspath(file)} is not a regular file")
        return Descriptor.open(file, os.O_RDWR if writable else os.O_RDONLY)
    return Descriptor.duplicate(check_open_file("file", file))


def set_size(fd: int, length: int) -> None:
    """Set the size of a file whose memory is to be mapped."""
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        raise_errno("ftruncate", error.errno or errno.EIO, 0, length)


def open_or_create(path: str, name: FileName) -> Descriptor:
    """Open or create a file for reading and writing; closing `name` removes a new one."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    while True:
        with suppress(FileExistsError):
            return Descriptor.create(path, flags, NEW_FILE_MODE, name)
        with suppress(FileNotFoundError):
            file = Descriptor.open(path, flags)
            name.note(path, file.number)
            return file


def shm_path(name: str) -> str:
    """Return the file of a POSIX shared memory name, by shm_open(3)'s rules."""
    plain = check_path("name", name).removeprefix("/")
    if not plain or plain in (".", "..") or "/" in plain or "\0" in plain:
        raise ValueError(
            f"{name!r} is not a shared memory name: it must be one path component, like '/name'"
        )
    if len(os.fsencode(plain)) > NAME_MAX:
        raise ValueError(f"the shared memory name has more than {NAME_MAX} bytes")
    return f"{SHM_FOLDER}/{plain}"


def is_writable(fd: int) -> bool:
    """Return whether a shared mapping of this descriptor may be writable."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR and not _write_sealed(fd)


def check_access(fd: int, *, shared: bool, writable: bool) -> None:
    """Raise UffdPermissionError, with the reason, if mmap(2) would refuse the mapping."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == os.O_WRONLY:
        hint = f"{describe(fd)} is open write-only: a mapping needs read access"
    elif not shared or not writable or is_writable(fd):
        return
    elif mode == os.O_RDONLY:
        hint = (
            f"{describe(fd)} is open read-only: open it for writing, or map it with"
            " writable=False or shared=False"
        )
    else:
        hint = f"{describe(fd)} is sealed against writing: map it with writable=False"
    raise UffdPermissionError(errno.EACCES, "mmap", hint=hint, fd=fd)


def check_size(fd: int, size: int, offset: int, length: int) -> None:
    """Raise ValueError if the file ends before the region: accesses beyond it raise SIGBUS."""
    if offset + length > size:
        raise ValueError(
            f"{describe(fd)} has {size:#x} bytes, fewer than {length:#x} from offset {offset:#x}"
        )


def check_space(fd: int, offset: int, length: int) -> None:
    """Raise ENOSPC if the file system cannot hold the region: an access would raise SIGBUS.

    This finds only what is certain to fail: blocks that the file has already may lie outside the
    region, and the free space may be used up later. `reserve` makes sure.
    """
    file_system = os.fstatvfs(fd)
    needed = length - os.fstat(fd).st_blocks * STAT_BLOCK
    free = file_system.f_bavail * file_system.f_frsize
    if file_system.f_blocks == 0 or needed <= free:  # no blocks: a tmpfs without a limit
        return
    raise_errno("mmap", errno.ENOSPC, offset, length, hint=_full(fd), needed=needed, free=free)


def reserve(fd: int, offset: int, length: int) -> None:
    """Allocate the range now; raise ENOSPC, with the sizes, if there is too little space."""
    try:
        _memory.fallocate(fd, 0, offset, length)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise_errno("fallocate", errno.ENOSPC, offset, length, hint=_full(fd))


def _full(fd: int) -> str:
    file_system = os.fstatvfs(fd)
    free, total = (
        blocks * file_system.f_frsize >> 10
        for blocks in (file_system.f_bavail, file_system.f_blocks)
    )
    folder = Path(describe(fd)).parent
    return f"the file system of {folder} has {free} KiB free of {total} KiB"


def _write_sealed(fd: int) -> bool:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False  # not a memfd
    return bool(seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
