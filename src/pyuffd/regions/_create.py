"""Make mappings: one function per constructor of `Region`, where they are documented."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from pyuffd import _machine
from pyuffd._arguments import check_path
from pyuffd._errors import UffdOSError
from pyuffd._owned import Descriptor, FileName
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
    memory = map_memory(length, page_size, flags)
    return Mapping(
        memory.start,
        length,
        page_size,
        RegionKind.ANONYMOUS,
        shared=False,
        writable=True,
        noreserve=noreserve,
        memory=memory,
    )


def memfd(
    length: int, *, shared: bool, huge_page_size: int | None, seal: bool, noreserve: bool
) -> Mapping:
    """Make a memfd of exactly this length and map it."""
    page_size = _machine.page_size_for(huge_page_size)
    check_length(length, page_size)
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if huge_page_size is not None:
        flags |= _machine.MFD_HUGETLB | _machine.size_bits(page_size)
    with _memfd_create(flags) as file:
        _files.set_size(file.number, length)
        if seal:
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, SIZE_SEALS)
        memory = map_memory(length, page_size, _sharing(shared, noreserve), fd=file.number)
        return Mapping(
            memory.start,
            length,
            page_size,
            RegionKind.MEMFD,
            shared=shared,
            writable=True,
            noreserve=noreserve,
            memory=memory,
            file=file.moved(),
        )


def shm(name: str, length: int, *, reserve: bool) -> Mapping:
    """Create or open POSIX shared memory; closing it removes a new file until `name.settle()`."""
    check_length(length, PAGE_SIZE)
    path = _files.shm_path(name)
    return _named(path, length, RegionKind.SHM, shared=True, reserve=reserve)


def hugetlbfs(
    path: str | os.PathLike[str], length: int, *, shared: bool, noreserve: bool
) -> Mapping:
    """Create or open a file on a hugetlbfs mount; a new file as for `shm`."""
    kind, name = RegionKind.HUGETLBFS, os.path.abspath(check_path("path", path))
    check_length(length, PAGE_SIZE)
    return _named(name, length, kind, shared=shared, reserve=False, noreserve=noreserve)


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
    with _files.own(file, writable=writable and shared) as descriptor:
        found = _files.facts(descriptor.number)
        check_aligned("offset", offset, found.page_size)
        if length is None:
            length = found.size - offset
        check_length(length, found.page_size)
        return _map_file(
            descriptor,
            length,
            found,
            offset=offset,
            shared=shared,
            writable=writable,
            reserve=reserve,
            noreserve=noreserve,
        )


def at(address: int, length: int, page_size: int | None) -> Mapping:
    """Describe memory that other code mapped."""
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
        shared=found.shared,
        writable=found.writable,
        offset=found.offset,
    )


def alias(mapping: Mapping) -> Mapping:
    """Map the same shared memory once more, at another address."""
    if mapping.fd is None or not mapping.shared:
        what = "shared memory whose file is unknown" if mapping.shared else "private memory"
        raise ValueError(
            f"the {mapping.kind.value} region at {mapping.start:#x} is {what}, which has no alias"
        )
    with Descriptor.duplicate(mapping.fd) as file:
        writable = _files.is_writable(file.number)
        memory = map_memory(
            mapping.length,
            mapping.page_size,
            _sharing(True, mapping.noreserve),
            prot=_protection(writable),
            fd=file.number,
            offset=mapping.offset,
        )
        return Mapping(
            memory.start,
            mapping.length,
            mapping.page_size,
            mapping.kind,
            shared=True,
            writable=writable,
            offset=mapping.offset,
            noreserve=mapping.noreserve,
            memory=memory,
            file=file.moved(),
        )


def _named(
    path: str,
    length: int,
    kind: RegionKind,
    *,
    shared: bool,
    reserve: bool,
    noreserve: bool = False,
) -> Mapping:
    with FileName() as name, _files.open_or_create(path, name) as file:
        found = _files.facts(file.number)
        if kind is RegionKind.HUGETLBFS and found.kind is not kind:
            raise ValueError(f"{path} is not on a hugetlbfs mount")
        check_length(length, found.page_size)
        if found.size == 0:  # new, or its creator has not set the size yet
            _files.set_size(file.number, length)
        return _map_file(
            file,
            length,
            _files.facts(file.number),
            kind=kind,
            shared=shared,
            reserve=reserve,
            noreserve=noreserve,
            name=name,
        )


def _map_file(
    file: Descriptor,
    length: int,
    found: _files.FileFacts,
    *,
    kind: RegionKind | None = None,
    offset: int = 0,
    shared: bool = True,
    writable: bool = True,
    reserve: bool = False,
    noreserve: bool = False,
    name: FileName | None = None,
) -> Mapping:
    """Map a file; the mapping returned owns file and name."""
    fd = file.number
    _files.check_access(fd, shared=shared, writable=writable)
    _files.check_size(fd, found.size, offset, length)
    if reserve:
        _files.reserve(fd, offset, length)
    elif found.page_size == PAGE_SIZE and (found.in_memory or (shared and writable)):
        _files.check_space(fd, offset, length)  # hugetlbfs reserves its pages in mmap(2)
    memory = map_memory(
        length,
        found.page_size,
        _sharing(shared, noreserve),
        prot=_protection(writable),
        fd=fd,
        offset=offset,
    )
    return Mapping(
        memory.start,
        length,
        found.page_size,
        kind or found.kind,
        shared=shared,
        writable=writable,
        offset=offset,
        noreserve=noreserve,
        memory=memory,
        file=file.moved(),
        name=(name or FileName()).moved(),
    )


def _memfd_create(flags: int) -> Descriptor:
    try:
        return Descriptor.memfd(MEMFD_NAME, flags | MFD_NOEXEC_SEAL)
    except UffdOSError as error:
        if error.errno != errno.EINVAL:
            raise
    return Descriptor.memfd(MEMFD_NAME, flags)


def _sharing(shared: bool, noreserve: bool) -> int:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return flags | (_machine.MAP_NORESERVE if noreserve else 0)


def _protection(writable: bool) -> int:
    return READ_WRITE if writable else mmap.PROT_READ
