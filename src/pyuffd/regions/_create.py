"""Making mappings: one function per constructor of `Region`, which has the documentation."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from pyuffd import _machine, _memory
from pyuffd._errors import UffdOSError
from pyuffd._pages import PAGE_SIZE, check_aligned, check_page_size, check_range
from pyuffd.regions import _files, _maps
from pyuffd.regions._mapping import READ_WRITE, Mapping, RegionKind, check_length, map_memory

MEMFD_NAME = "pyuffd"
MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; vm.memfd_noexec=2 refuses memfds without it
SIZE_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def anonymous(length: int, huge_page_size: int | None, *, noreserve: bool) -> Mapping:
    """Map private anonymous memory."""
    page_size = _machine.page_size_for(huge_page_size)
    check_length(length, page_size)
    flags = _sharing(False, noreserve) | mmap.MAP_ANONYMOUS
    if huge_page_size is not None:
        flags |= _machine.MAP_HUGETLB | _machine.size_bits(page_size)
    start = map_memory(length, page_size, flags)
    kind = RegionKind.ANONYMOUS
    return Mapping(start, length, page_size, kind, None, False, True, noreserve=noreserve)


def memfd(
    length: int, *, shared: bool, huge_page_size: int | None, seal: bool, noreserve: bool
) -> Mapping:
    """Make a memfd of exactly this length and map it."""
    page_size = _machine.page_size_for(huge_page_size)
    check_length(length, page_size)
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if huge_page_size is not None:
        flags |= _machine.MFD_HUGETLB | _machine.size_bits(page_size)
    fd = _memfd_create(flags)
    try:
        _files.set_size(fd, length)
        if seal:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
        start = map_memory(length, page_size, _sharing(shared, noreserve), fd=fd)
    except BaseException:
        os.close(fd)
        raise
    kind = RegionKind.MEMFD
    return Mapping(start, length, page_size, kind, fd, shared, True, noreserve=noreserve)


def shm(name: str, length: int, *, reserve: bool, unlink: bool) -> Mapping:
    """Create or open POSIX shared memory."""
    check_length(length, PAGE_SIZE)
    path = _files.shm_path(name)
    return _named(path, length, RegionKind.SHM, shared=True, reserve=reserve, unlink=unlink)


def hugetlbfs(path: str, length: int, *, shared: bool, unlink: bool, noreserve: bool) -> Mapping:
    """Create or open a file on a hugetlbfs mount."""
    kind, path = RegionKind.HUGETLBFS, os.path.abspath(path)
    return _named(
        path, length, kind, shared=shared, reserve=False, unlink=unlink, noreserve=noreserve
    )


def file(
    file: _files.FileLike,
    length: int | None,
    *,
    offset: int,
    shared: bool,
    writable: bool,
    reserve: bool,
    noreserve: bool,
) -> Mapping:
    """Map part of an existing file."""
    if reserve and noreserve:
        raise ValueError("reserve and noreserve contradict each other")
    fd = _files.own_fd(file, writable=writable and shared)
    try:
        found = _files.facts(fd)
        check_aligned("offset", offset, found.page_size)
        if length is None:
            length = found.size - offset
        check_length(length, found.page_size)
        return _map_file(
            fd,
            length,
            found,
            offset=offset,
            shared=shared,
            writable=writable,
            reserve=reserve,
            noreserve=noreserve,
        )
    except BaseException:
        os.close(fd)
        raise


def at(address: int, length: int, page_size: int | None) -> Mapping:
    """Describe memory that somebody else mapped."""
    least = PAGE_SIZE if page_size is None else check_page_size(page_size)
    check_range(address, length, least, name="address")
    found = _maps.describe(address, length, ask_page_size=page_size is None)
    page_size = page_size or found.page_size
    check_range(address, length, page_size, name="address")
    return Mapping(
        address,
        length,
        page_size,
        RegionKind.ADDRESS,
        None,
        found.shared,
        found.writable,
        found.offset,
        owned=False,
    )


def alias(mapping: Mapping) -> Mapping:
    """Map the same shared memory once more, at another address."""
    if mapping.fd is None or not mapping.shared:
        what = "shared memory whose file is not known" if mapping.shared else "private memory"
        raise ValueError(f"{mapping.kind.value} region at {mapping.start:#x} is {what}: no alias")
    fd = os.dup(mapping.fd)
    try:
        writable = _files.is_writable(fd)
        start = map_memory(
            mapping.length,
            mapping.page_size,
            _sharing(True, mapping.noreserve),
            prot=_protection(writable),
            fd=fd,
            offset=mapping.offset,
        )
    except BaseException:
        os.close(fd)
        raise
    return Mapping(
        start,
        mapping.length,
        mapping.page_size,
        mapping.kind,
        fd,
        True,
        writable,
        mapping.offset,
        mapping.noreserve,
    )


def _named(
    path: str,
    length: int,
    kind: RegionKind,
    *,
    shared: bool,
    reserve: bool,
    unlink: bool,
    noreserve: bool = False,
) -> Mapping:
    fd, is_new = _files.open_or_create(path)
    try:
        found = _files.facts(fd)
        if kind is RegionKind.HUGETLBFS and found.kind is not kind:
            raise ValueError(f"{path} is not on a hugetlbfs mount")
        check_length(length, found.page_size)
        if found.size == 0:  # new, or its creator has not come to this line yet
            _files.set_size(fd, length)
        return _map_file(
            fd,
            length,
            _files.facts(fd),
            kind=kind,
            shared=shared,
            reserve=reserve,
            noreserve=noreserve,
            unlink=path if unlink else None,
        )
    except BaseException:
        if is_new:
            _files.unlink(path, fd)
        os.close(fd)
        raise


def _map_file(
    fd: int,
    length: int,
    found: _files.FileFacts,
    *,
    kind: RegionKind | None = None,
    offset: int = 0,
    shared: bool = True,
    writable: bool = True,
    reserve: bool = False,
    noreserve: bool = False,
    unlink: str | None = None,
) -> Mapping:
    _files.check_access(fd, shared=shared, writable=writable)
    _files.check_size(fd, found.size, offset, length)
    if reserve:
        _files.reserve(fd, offset, length)
    elif found.page_size == PAGE_SIZE and (found.in_memory or (shared and writable)):
        _files.check_space(fd, offset, length)  # hugetlbfs reserves its pages in mmap(2)
    start = map_memory(
        length,
        found.page_size,
        _sharing(shared, noreserve),
        prot=_protection(writable),
        fd=fd,
        offset=offset,
    )
    return Mapping(
        start,
        length,
        found.page_size,
        kind or found.kind,
        fd,
        shared,
        writable,
        offset,
        noreserve,
        unlink=unlink,
    )


def _memfd_create(flags: int) -> int:
    try:
        return _memory.memfd_create(MEMFD_NAME, flags | MFD_NOEXEC_SEAL)
    except UffdOSError as error:
        if error.errno != errno.EINVAL:
            raise
    return _memory.memfd_create(MEMFD_NAME, flags)


def _sharing(shared: bool, noreserve: bool) -> int:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return flags | (_machine.MAP_NORESERVE if noreserve else 0)


def _protection(writable: bool) -> int:
    return READ_WRITE if writable else mmap.PROT_READ
