"""Errors of UFFDIO_REGISTER, UNREGISTER and WAKE, and registering again (layer L5)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import tempfile
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ALL,
    ANY,
    HUGETLB,
    SMALL,
    missing_features,
    missing_wp_features,
)
from pyuffd.conformance.cases.errno_fill import GAP, KERNEL_ADDRESS, orphan
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

LIMIT = 1 << 64
SYS_MEMFD_SECRET = 447
MFD_ALLOW_SEALING, F_SEAL_FUTURE_WRITE = 2, 0x10
MAP_DROPPABLE = 0x08
TMPFS = 0x01021994
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

# Returns the range of a call that is refused, given the region's start and its page size.
Range = Callable[[int, int], tuple[int, int]]
_RANGES: tuple[tuple[str, str, tuple[str, ...], Range], ...] = (
    (
        "start-unaligned",
        "A start that is not a multiple of the page size is refused",
        ALL,
        lambda start, page: (start + 1, page),
    ),
    (
        "length-unaligned",
        "A len that is not a multiple of the page size is refused",
        ALL,
        lambda start, page: (start, page - 1),
    ),
    ("length-zero", "A len of 0 is refused", ALL, lambda start, page: (start, 0)),
    (
        "length-wraps",
        "A range that wraps around the end of all addresses is refused",
        ALL,
        lambda start, page: (start, LIMIT - page),
    ),
    (
        "start-not-user",
        "A start outside user space is refused",
        ALL,
        lambda start, page: (KERNEL_ADDRESS, page),
    ),
)
_HUGE_RANGES: tuple[tuple[str, str, tuple[str, ...], Range], ...] = (
    (
        "start-small-page",
        "A start inside a huge page is refused",
        HUGETLB,
        lambda start, page: (start + SMALL_PAGE, page - SMALL_PAGE),
    ),
    (
        "length-small-page",
        "A range that ends inside a huge page is refused",
        HUGETLB,
        lambda start, page: (start, SMALL_PAGE),
    ),
)


def vm_flags(address: int) -> set[str]:
    """Return the userfaultfd letters among the VmFlags of the mapping at `address`."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(head[1], 16) <= address < int(head[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()) & {"um", "uw", "ui"}
    return set()


def _expect(
    ctx: Context, code: int, name: str, *words: int, uffd: int | None = None
) -> tuple[int, ...]:
    answer = ctx.ioctl(name, *words, uffd=uffd)
    ctx.expect(f"errno of {name}", answer.errno, code)
    return answer.words


def _add_range(op: str, name: str, text: str, memory: tuple[str, ...], words: Range) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(2)
        ctx.open()
        if op != "REGISTER":
            ctx.register(region, MISSING)
        before = vm_flags(region.start)
        mode = (int(MISSING),) if op == "REGISTER" else ()
        _expect(ctx, errno.EINVAL, op, *words(region.start, ctx.page), *mode)
        ctx.expect("VmFlags", vm_flags(region.start), before)

    case(
        f"UFFDIO_{op}.EINVAL.{name}",
        origin=f"UFFDIO_{op}(2const): EINVAL",
        memory=memory,
        features=missing_features,
        summary=text,
    )(run)


for _op in ("REGISTER", "UNREGISTER", "WAKE"):
    for _row in _RANGES if _op == "WAKE" else _RANGES + _HUGE_RANGES:
        _add_range(_op, *_row)


# UFFDIO_REGISTER


@case("UFFDIO_REGISTER.EINVAL.mode", origin="UFFDIO_REGISTER(2const): EINVAL")
def mode_unknown(ctx: Context) -> None:
    """A mode is refused if it is 0 or has a bit that no feature of this kernel defines."""
    region = ctx.make(1)
    ctx.open()
    known = RegisterMode.RWP if ctx.offered & Feature.RWP else RegisterMode.MINOR
    for mode in (0, int(known) << 1, 1 << 63, int(MISSING) | 1 << 63):
        _expect(ctx, errno.EINVAL, "REGISTER", region.start, ctx.page, mode)


@case(
    "UFFDIO_REGISTER.EINVAL.unmapped",
    origin="UFFDIO_REGISTER(2const): EINVAL",
    features=missing_features,
)
def unmapped(ctx: Context) -> None:
    """A range in which nothing is mapped is refused."""
    region = ctx.make(1)
    start = region.start
    ctx.open()
    region.close()
    _expect(ctx, errno.EINVAL, "REGISTER", start, ctx.page, MISSING)


@case(
    "UFFDIO_REGISTER.EBUSY.other-uffd",
    origin="UFFDIO_REGISTER(2const): EBUSY",
    features=missing_features,
)
def other_uffd(ctx: Context) -> None:
    """A range is refused if a part of it is registered with another userfaultfd."""
    region = ctx.make(2)
    ctx.register(region, MISSING, 1)
    other = ctx.open().fileno()
    _expect(ctx, errno.EBUSY, "REGISTER", region.start, region.length, MISSING, uffd=other)
    ctx.uffd.unregister(region.start, ctx.page)
    _expect(ctx, 0, "REGISTER", region.start, region.length, MISSING, uffd=other)


def _with_fork(memory: MemoryType) -> Feature:
    return missing_features(memory) | Feature.EVENT_FORK


@case(
    "UFFDIO_REGISTER.ENOMEM.owner-gone",
    origin="fs/userfaultfd.c: userfaultfd_register",
    features=_with_fork,
)
def owner_gone(ctx: Context) -> None:
    """After the process has ended, REGISTER and UNREGISTER are ENOMEM, and WAKE succeeds."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    # If one of these calls leaked a reference, the address space would outlive its process.
    own = child.uffd.fileno()
    for start, code in ((region.start, 0), (GAP, errno.EINVAL)):
        _expect(ctx, code, "REGISTER", start, ctx.page, MISSING, uffd=own)
        _expect(ctx, code, "UNREGISTER", start, ctx.page, uffd=own)
    fd = orphan(ctx, child)
    _expect(ctx, errno.ENOMEM, "REGISTER", region.start, ctx.page, MISSING, uffd=fd)
    _expect(ctx, errno.ENOMEM, "UNREGISTER", region.start, ctx.page, uffd=fd)
    _expect(ctx, 0, "WAKE", region.start, ctx.page, uffd=fd)


def _map_file(ctx: Context, prot: int, flags: int, fd: int, length: int = SMALL_PAGE) -> int:
    address = _memory.mmap(length, prot, flags, fd)
    ctx.callback(_memory.munmap, address, length)
    return address


@case(
    "UFFDIO_REGISTER.EINVAL.memfd-secret",
    origin="UFFDIO_REGISTER(2const): EINVAL",
    memory=ANY,
)
def memfd_secret(ctx: Context) -> None:
    """Memory of memfd_secret(2) cannot be registered."""
    fd = syscall(SYS_MEMFD_SECRET, 0)
    if fd < 0:
        ctx.lack("memfd_secret", f"memfd_secret: {errno.errorcode.get(-fd, fd)}")
    ctx.callback(os.close, fd)
    os.ftruncate(fd, SMALL_PAGE)
    address = _map_file(ctx, READ_WRITE, mmap.MAP_SHARED, fd)
    ctx.open()
    for mode in (1, 2, 4):
        _expect(ctx, errno.EINVAL, "REGISTER", address, SMALL_PAGE, mode)


@case(
    "UFFDIO_REGISTER.EINVAL.droppable",
    origin="include/linux/userfaultfd_k.h: vma_can_userfault, VM_DROPPABLE",
    memory=ANY,
    features=Feature.WP_ASYNC,
    variants=(
        Variant("refused", "EINVAL in every mode"),
        Variant("registered", "registered like other anonymous memory, which is a kernel bug"),
    ),
)
def droppable(ctx: Context) -> None:
    """Memory that the kernel may drop at any time (MAP_DROPPABLE) cannot be registered."""
    try:
        address = _map_file(ctx, READ_WRITE, MAP_DROPPABLE | mmap.MAP_ANONYMOUS, -1)
    except OSError as error:
        ctx.lack("MAP_DROPPABLE", f"mmap: {error.strerror}")
    ctx.open()
    seen = [ctx.ioctl("REGISTER", address, SMALL_PAGE, mode).errno for mode in range(1, 8)]
    # MISSING, WP and both; memory without a file cannot be registered for MINOR.
    ctx.expect_variant(
        "errnos of REGISTER by mode",
        seen,
        refused=[errno.EINVAL] * 7,
        registered=[0] * 3 + [errno.EINVAL] * 4,
    )


@case(
    "UFFDIO_REGISTER.EPERM.shared-read-only",
    origin="fs/userfaultfd.c: userfaultfd_register",
    memory=ANY,
    features=Feature.MISSING_SHMEM,
)
def shared_read_only(ctx: Context) -> None:
    """A shared mapping of a file opened read-only is refused; a private one can be registered."""
    region = ctx.make(1, "shmem")
    fd = os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    ctx.open()
    shared = _map_file(ctx, mmap.PROT_READ, mmap.MAP_SHARED, fd)
    _expect(ctx, errno.EPERM, "REGISTER", shared, SMALL_PAGE, MISSING)
    private = _map_file(ctx, mmap.PROT_READ, mmap.MAP_PRIVATE, fd)
    _expect(ctx, 0, "REGISTER", private, SMALL_PAGE, MISSING)


@case(
    "UFFDIO_REGISTER.EPERM.sealed",
    origin="fs/userfaultfd.c: userfaultfd_register, VM_MAYWRITE",
    memory=ANY,
    features=Feature.MISSING_SHMEM,
)
def sealed(ctx: Context) -> None:
    """A shared mapping of a memfd sealed against writing is refused; a private one is filled."""
    fd = _memory.memfd_create("pyuffd-sealed", MFD_ALLOW_SEALING)
    ctx.callback(os.close, fd)
    os.ftruncate(fd, SMALL_PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    ctx.open()
    shared = _map_file(ctx, mmap.PROT_READ, mmap.MAP_SHARED, fd)
    _expect(ctx, errno.EPERM, "REGISTER", shared, SMALL_PAGE, MISSING)
    private = _map_file(ctx, READ_WRITE, mmap.MAP_PRIVATE, fd)
    _expect(ctx, 0, "REGISTER", private, SMALL_PAGE, MISSING)
    ctx.expect("bytes copied", ctx.uffd.copy(private, b"\5" * SMALL_PAGE), SMALL_PAGE)
    ctx.expect("byte", ctx.silently(ctx.read, private), b"\5")
    ctx.expect("byte of the file", os.pread(fd, 1, 0), b"\0")


@case("UFFDIO_REGISTER.ok.read-only", origin="UFFDIO_REGISTER(2const)", memory=ANY)
def read_only(ctx: Context) -> None:
    """Anonymous memory mapped read-only can be registered and filled."""
    region = ctx.make(1, "anon")
    _memory.mprotect(region.start, SMALL_PAGE, mmap.PROT_READ)
    ctx.register(region, MISSING)
    ctx.expect("bytes copied", ctx.uffd.copy(region.start, b"\5" * SMALL_PAGE), SMALL_PAGE)
    ctx.expect("byte", ctx.silently(ctx.read, region.start), b"\5")


def disk_page(ctx: Context, flags: int, pages: int = 1) -> int:
    """Map pages with data of a file on a disk file system."""
    length = pages * SMALL_PAGE
    with tempfile.TemporaryFile(dir="/var/tmp", buffering=0) as file:
        if _memory.fstatfs(file.fileno())[0] == TMPFS:
            ctx.lack("disk-file", "/var/tmp is a tmpfs")
        file.write(bytes(length))
        return _map_file(ctx, READ_WRITE, flags, file.fileno(), length)


@case("UFFDIO_REGISTER.EINVAL.disk-file", origin="UFFDIO_REGISTER(2const): EINVAL", memory=ANY)
def disk_file(ctx: Context) -> None:
    """Without WP_ASYNC, a file on a disk file system cannot be registered in any mode."""
    ctx.open()
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        address = disk_page(ctx, flags)
        for mode in range(1, 8):
            _expect(ctx, errno.EINVAL, "REGISTER", address, SMALL_PAGE, mode)
        _expect(ctx, errno.EINVAL, "UNREGISTER", address, SMALL_PAGE)


@case(
    "UFFDIO_REGISTER.ok.disk-file-async",
    origin="UFFDIO_REGISTER(2const), UFFD_FEATURE_WP_ASYNC",
    memory=ANY,
    features=Feature.WP_ASYNC,
)
def disk_file_async(ctx: Context) -> None:
    """With WP_ASYNC, a file on a disk file system can be registered in mode WP and no other."""
    ctx.open()
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        address = disk_page(ctx, flags)
        for mode in (1, 3, 4, 5, 6, 7):
            _expect(ctx, errno.EINVAL, "REGISTER", address, SMALL_PAGE, mode)
        _expect(ctx, 0, "REGISTER", address, SMALL_PAGE, WP)
        ctx.expect("VmFlags", vm_flags(address), {"uw"})


# Registering again


_REFUSED = Variant("refused", "EBUSY if the new modes lack WP, and nothing is changed")
_DROPPED = Variant("dropped", "the new modes may lack WP; no feature bit tells")


@case(
    "UFFDIO_REGISTER.ok.again-subset",
    origin="fs/userfaultfd.c",
    features=missing_wp_features,
    variants=[_DROPPED, _REFUSED],
)
def again_subset(ctx: Context) -> None:
    """Registering again in a subset of the modes changes nothing."""
    region = ctx.make(1)
    ctx.register(region, MISSING | WP)
    answer = ctx.ioctl("REGISTER", region.start, ctx.page, MISSING)
    ctx.expect_variant("errno of REGISTER without WP", answer.errno, dropped=0, refused=errno.EBUSY)
    ctx.expect("VmFlags", vm_flags(region.start), {"um", "uw"})
    for mode in (WP, MISSING | WP):
        _expect(ctx, 0, "REGISTER", region.start, ctx.page, mode)
        ctx.expect("VmFlags", vm_flags(region.start), {"um", "uw"})


@case(
    "UFFDIO_REGISTER.ok.again-replaces",
    origin="fs/userfaultfd.c",
    features=missing_wp_features,
    variants=[_DROPPED, _REFUSED],
)
def again_replaces(ctx: Context) -> None:
    """Registering again in other modes replaces the modes and does not add to them."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    _expect(ctx, 0, "REGISTER", region.start, ctx.page, WP)
    ctx.expect("VmFlags", vm_flags(region.start), {"uw"})
    answer = ctx.ioctl("REGISTER", region.start, ctx.page, MISSING)
    ctx.expect_variant("errno of REGISTER without WP", answer.errno, dropped=0, refused=errno.EBUSY)
    ctx.expect_variant("VmFlags", vm_flags(region.start), dropped={"um"}, refused={"uw"})
    _expect(ctx, 0, "REGISTER", region.start, ctx.page, MISSING | WP)
    ctx.expect("VmFlags", vm_flags(region.start), {"um", "uw"})


_LEFT = (
    Variant("left", "the protection stays, and no ioctl can remove it"),
    Variant("cleared", "the protection is removed with the WP mode"),
    _REFUSED,
)


def _protected(ctx: Context, *, data: bool) -> Region:
    """Return a protected page, or a protected hole."""
    region = ctx.make(1)
    ctx.register(region, WP)
    if data:
        region.fill(1)
    ctx.uffd.writeprotect(region)
    return region


def _drops_wp(ctx: Context, region: Region) -> bool:
    """Register again without WP and return True, or unregister first and return False."""
    before = ctx.pagemap(region.start)
    answer = ctx.ioctl("REGISTER", region.start, ctx.page, MISSING)
    if not answer.errno:
        ctx.expect("VmFlags", vm_flags(region.start), {"um"})
        return True
    ctx.expect_variant("errno of REGISTER without WP", answer.errno, refused=errno.EBUSY)
    ctx.expect("VmFlags", vm_flags(region.start), {"uw"})
    ctx.expect_pagemap(region.start, before)
    _expect(ctx, 0, "UNREGISTER", region.start, ctx.page)
    ctx.expect_pagemap(region.start, "???-?")
    _expect(ctx, 0, "REGISTER", region.start, ctx.page, MISSING)
    return False


@case(
    "UFFDIO_REGISTER.ok.again-without-wp",
    origin="fs/userfaultfd.c",
    memory=SMALL,
    features=missing_wp_features,
    variants=_LEFT,
)
def again_without_wp(ctx: Context) -> None:
    """A protected page registered again without WP is written without a message."""
    region = _protected(ctx, data=True)
    if _drops_wp(ctx, region):
        ctx.expect_variant("pagemap", ctx.pagemap(region.start), left="P??W?", cleared="P??-?")
    _expect(ctx, errno.ENOENT, "WRITEPROTECT", region.start, ctx.page, 0)
    ctx.expect("the write", ctx.silently(ctx.write, region.start, b"\2"), None)


@case(
    "UFFDIO_REGISTER.ok.again-without-wp-marker",
    origin="fs/userfaultfd.c",
    memory=("shmem", "shmem-private"),
    features=missing_wp_features,
    variants=_LEFT,
)
def again_marker(ctx: Context) -> None:
    """A marker in a range registered again without WP faults as a missing page."""
    region = _protected(ctx, data=False)
    ctx.expect_pagemap(region.start, "-S-W-")
    if _drops_wp(ctx, region):
        ctx.expect_variant("pagemap", ctx.pagemap(region.start), left="-S-W-", cleared="-----")
    write = ctx.start(ctx.write, region.start, b"\2")
    ctx.expect_fault(1, region.start)
    ctx.uffd.copy(region.start, bytes(ctx.page))
    ctx.expect("the write", write.result(), None)
    ctx.expect_pagemap(region.start, "P??-?")


@case(
    "UFFDIO_REGISTER.ok.again-hugetlb-unprotected",
    origin="fs/userfaultfd.c",
    memory=HUGETLB,
    features=missing_wp_features,
    variants=[_DROPPED, _REFUSED],
)
def again_hugetlb(ctx: Context) -> None:
    """A huge page unprotected before WP is dropped is written without a message.

    If it were still protected, the write would never end.
    """
    region = _protected(ctx, data=True)
    _expect(ctx, 0, "WRITEPROTECT", region.start, ctx.page, 0)
    if _drops_wp(ctx, region):
        ctx.expect_variant("VmFlags", vm_flags(region.start), dropped={"um"})
    ctx.expect_pagemap(region.start, "P??-?")
    ctx.expect("the write", ctx.silently(ctx.write, region.start, b"\2"), None)


# UFFDIO_UNREGISTER and UFFDIO_WAKE


@case(
    "UFFDIO_UNREGISTER.EINVAL.unmapped",
    origin="UFFDIO_UNREGISTER(2const): EINVAL",
    features=missing_features,
)
def unregister_unmapped(ctx: Context) -> None:
    """A range in which nothing is mapped is refused."""
    region = ctx.make(1)
    start = region.start
    ctx.register(region, MISSING)
    region.close()
    _expect(ctx, errno.EINVAL, "UNREGISTER", start, ctx.page)


@case(
    "UFFDIO_UNREGISTER.EINVAL.other-uffd",
    origin="fs/userfaultfd.c: userfaultfd_unregister",
    features=missing_features,
    variants=[
        Variant("refused", "EINVAL, and the range stays registered"),
        Variant("done", "any userfaultfd can unregister any range; no feature bit tells"),
    ],
)
def unregister_other(ctx: Context) -> None:
    """UNREGISTER refuses a range that is registered with another userfaultfd."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    answer = ctx.ioctl("UNREGISTER", region.start, ctx.page, uffd=ctx.open().fileno())
    ctx.expect_variant("errno of UNREGISTER", answer.errno, refused=errno.EINVAL, done=0)
    flags = vm_flags(region.start)
    ctx.expect_variant("VmFlags", flags, refused={"um"}, done=set())


@case("UFFDIO_UNREGISTER.ok.twice", origin="UFFDIO_UNREGISTER(2const)", features=missing_features)
def unregister_twice(ctx: Context) -> None:
    """UNREGISTER of a range that is no longer registered succeeds."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    for _ in range(2):
        _expect(ctx, 0, "UNREGISTER", region.start, ctx.page)
    ctx.expect("VmFlags", vm_flags(region.start), set())
    ctx.expect("byte", ctx.silently(ctx.read, region.start), b"\0")


@case("UFFDIO_UNREGISTER.ok.half", origin="UFFDIO_UNREGISTER(2const)", features=missing_features)
def unregister_half(ctx: Context) -> None:
    """UNREGISTER of a part of a range leaves the rest registered."""
    region = ctx.make(2)
    ctx.register(region, MISSING)
    _expect(ctx, 0, "UNREGISTER", region.start, ctx.page)
    ctx.expect("byte", ctx.silently(ctx.read, region.start), b"\0")
    read = ctx.start(ctx.read, region.start + ctx.page)
    ctx.expect_fault(0, region.start + ctx.page)
    ctx.uffd.copy(region.start + ctx.page, b"\6" * ctx.page)
    ctx.expect("byte", read.result(), b"\6")


@case("UFFDIO_WAKE.ok.unregistered", origin="UFFDIO_WAKE(2const)", memory=ANY)
def wake_unregistered(ctx: Context) -> None:
    """WAKE of a range that is not registered succeeds."""
    ctx.open()
    _expect(ctx, 0, "WAKE", 1 << 20, SMALL_PAGE)
