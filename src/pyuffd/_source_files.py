"""Files that pages can be read from: open them, refuse others, find their size (layer L2)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from typing import IO

from pyuffd import _memory
from pyuffd._arguments import check_path
from pyuffd._errors import UffdOSError, UffdPermissionError
from pyuffd._machine import raise_without_procfs
from pyuffd._open_files import check_open_file
from pyuffd._owned import Descriptor, MappedMemory
from pyuffd._pages import PAGE_SIZE

HUGETLBFS_MAGIC = 0x958458F6

FileLike = str | os.PathLike[str] | IO[bytes] | int

_BLKGETSIZE64 = 0x80081272  # _IOR(0x12, 114, size_t)
_MAP_NORESERVE = 0x4000  # in the mmap module since Python 3.13
# ENODEV from most files that cannot be mapped, EIO from procfs, EINVAL from file systems with
# private mappings only (9p).
_NOT_MAPPABLE = (errno.ENODEV, errno.EIO, errno.EINVAL)
_ZERO_DEVICE = os.makedev(1, 5)
_INSTEAD = "read it into memory for a BufferSource, or use a CallableSource"


def open_source(file: FileLike) -> Descriptor:
    """Return a new descriptor, the caller's, of a file that can be mapped and read by offset.

    Raises:
        ValueError: a directory, pipe, socket or character device, or a file without pages.
        TypeError: an open file whose bytes are not those of its descriptor.
        UffdPermissionError: EACCES - a descriptor that is open for writing only.
        OSError: the file cannot be opened.
    """
    if isinstance(file, (str, os.PathLike)):
        check_path("file", file)
        _check_kind(os.stat(file), os.fspath(file))  # opening a FIFO would block until a writer
        opened = Descriptor.open(file, os.O_RDONLY)
    else:
        opened = Descriptor.duplicate(check_open_file("file", file))
    with opened:
        _check_kind(os.fstat(opened.number), name_of(opened.number))
        with _without_direct(opened) as descriptor:
            _check_mappable(descriptor.number)
            return descriptor.moved()


def size_of(fd: int) -> int:
    """Return the present size in bytes of a file or a block device."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    # Not by seeking, which would move the position of the descriptor that this duplicates.
    (size,) = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
    return int(size)


def identity_of(fd: int) -> tuple[int, ...]:
    """Return what tells an open file or block device from any other one."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return status.st_dev, status.st_ino


def mapping_unit(fd: int) -> int:
    """Return the page size of a file's mappings: that of its hugetlbfs mount, or 4 KiB."""
    magic, block_size = _memory.fstatfs(fd)
    return block_size if magic == HUGETLBFS_MAGIC else PAGE_SIZE


def name_of(fd: int) -> str:
    """Return the kernel's name of an open file: its path."""
    path = name_in_proc(fd)
    try:
        return os.readlink(path)
    except OSError as error:
        raise_without_procfs(f"read {path}", error)
        raise


def name_in_proc(fd: int) -> str:
    """Return a path by which this process can open the same file again."""
    return f"/proc/self/fd/{fd}"


def _check_kind(status: os.stat_result, name: str) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name} is a directory, not a file of pages")
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket"
        raise ValueError(f"{name} is a {kind}, which cannot be read by offset: {_INSTEAD}")
    if stat.S_ISCHR(mode) and status.st_rdev == _ZERO_DEVICE:
        raise ValueError(f"{name} has no end: use ZeroSource() for zeros")
    kind = "a character device" if stat.S_ISCHR(mode) else "not a file on any file system"
    raise ValueError(f"{name} is {kind}, without a size: {_INSTEAD}")


def _without_direct(descriptor: Descriptor) -> Descriptor:
    """Return the descriptor, or if it has O_DIRECT (aligned reads only) a new one without."""
    if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        return descriptor
    return Descriptor.open(name_in_proc(descriptor.number), os.O_RDONLY)


def _check_mappable(fd: int) -> None:
    """Check that the file can be mapped, as UFFDIO_COPY reads its pages from a mapping."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise UffdPermissionError(
            errno.EACCES, "mmap", hint=f"{name_of(fd)} is open for writing only", fd=fd
        )
    size = mapping_unit(fd)
    try:
        with MappedMemory.map(size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_NORESERVE, fd):
            pass
    except UffdOSError as error:
        if error.errno not in _NOT_MAPPABLE:
            raise
        raise ValueError(
            f"{name_of(fd)} cannot be mapped (files of procfs and sysfs, for example, cannot):"
            f" {_INSTEAD}"
        ) from None
