"""The ioctls that UFFDIO_REGISTER offers, by memory type and mode (layer L5).

Of the ioctls in `KNOWN`, the mask must have exactly those expected. Others are a variant.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import Feature, Ioctl, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANY, minor_features, missing_features, wp_features
from pyuffd.conformance.cases.errno_register import disk_page
from pyuffd.conformance.cases.scan_arguments import special_mapping
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES, SMALL_PAGE, MemoryType
from pyuffd.testing._need import Need, needs_hugepages

ORIGIN = "UFFDIO_REGISTER(2const): .ioctls"
MAP_GROWSDOWN, MAP_HUGETLB = 0x100, 0x40000
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
KNOWN = (
    Ioctl.WAKE
    | Ioctl.COPY
    | Ioctl.ZEROPAGE
    | Ioctl.MOVE
    | Ioctl.WRITEPROTECT
    | Ioctl.CONTINUE
    | Ioctl.POISON
    | Ioctl.RWPROTECT
)
MASK_VARIANTS = (
    Variant("exact", "only ioctls that this suite knows"),
    Variant("more", "also ioctls that this suite does not know"),
)


def wanted(memory: MemoryType, mode: RegisterMode, offered: int) -> Ioctl | None:
    """Return the mask that REGISTER must return in this mode, or None if it must fail."""
    needed = Feature(0)
    if RegisterMode.MISSING in mode:
        needed |= missing_features(memory)
    if RegisterMode.WP in mode:
        needed |= wp_features(memory)
    if RegisterMode.MINOR in mode:
        if memory.is_anon:
            return None
        needed |= minor_features(memory)
    if int(needed) & ~offered or not mode:
        return None
    mask = Ioctl.WAKE | Ioctl.COPY
    if offered & Feature.POISON:
        mask |= Ioctl.POISON
    if not memory.is_hugetlb:
        mask |= Ioctl.ZEROPAGE
        if offered & Feature.MOVE:
            mask |= Ioctl.MOVE
    if RegisterMode.WP in mode:
        mask |= Ioctl.WRITEPROTECT
    if RegisterMode.MINOR in mode:
        mask |= Ioctl.CONTINUE
    return mask


def check_mask(
    ctx: Context, memory: MemoryType, mode: RegisterMode, start: int, length: int
) -> None:
    """Register in this mode, and check the mask of ioctls, or that it fails with EINVAL."""
    mask = wanted(memory, mode, ctx.offered)
    answer = ctx.ioctl("REGISTER", start, length, mode)
    if mask is None:
        ctx.expect("errno of REGISTER", answer.errno, errno.EINVAL)
        return
    ctx.expect("errno of REGISTER", answer.errno, 0)
    ctx.expect("known ioctls", hex(answer.words[3] & KNOWN), hex(mask))
    more = answer.words[3] & ~int(KNOWN)
    ctx.expect_variant(f"others ({more:#x})", bool(more), exact=False, more=True)


def _add_mode(mode: RegisterMode) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        ctx.open(Feature(0))
        check_mask(ctx, ctx.memory, mode, region.start, region.length)

    names = [kind for kind in MEMORY_TYPES if wanted(MEMORY_TYPES[kind], mode, -1) is not None]
    text = "-".join(bit.name.lower() for bit in RegisterMode(mode) if bit.name)
    modes = " | ".join(bit.name for bit in RegisterMode(mode) if bit.name)
    case(
        f"UFFDIO_REGISTER.ok.mask-{text}",
        origin=ORIGIN,
        memory=names,
        variants=MASK_VARIANTS,
        summary=f"REGISTER in mode {modes} offers exactly the ioctls of this mode; EINVAL if the "
        "feature for this memory type is missing",
    )(run)


for _bits in range(1, 8):
    _add_mode(RegisterMode(_bits))


@case(
    "UFFDIO_REGISTER.EINVAL.mode-minor",
    origin="UFFDIO_REGISTER(2const): EINVAL",
    memory=("anon",),
)
def minor_anon(ctx: Context) -> None:
    """Anonymous memory cannot be registered in mode MINOR, alone or with other modes."""
    region = ctx.make(1)
    ctx.open()
    for bits in (4, 5, 6, 7):
        check_mask(ctx, ctx.memory, RegisterMode(bits), region.start, region.length)


# Other ways to map memory, each of which must give the masks of a memory type.


def _map(ctx: Context, length: int, flags: int, fd: int = -1) -> int:
    address = _memory.mmap(length, READ_WRITE, flags, fd)
    ctx.callback(_memory.munmap, address, length)
    return address


def _shared_anonymous(ctx: Context) -> int:
    return _map(ctx, SMALL_PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _stack(ctx: Context) -> int:
    return _map(ctx, SMALL_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_GROWSDOWN)


def _dev_zero(ctx: Context) -> int:
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    return _map(ctx, SMALL_PAGE, mmap.MAP_PRIVATE, fd)


def _dev_shm(ctx: Context) -> int:
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        file.truncate(SMALL_PAGE)
        return _map(ctx, SMALL_PAGE, mmap.MAP_SHARED, file.fileno())


def _map_hugetlb(ctx: Context) -> int:
    return _map(ctx, HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)


def _add_kind(
    name: str, what: str, like: str, make: Callable[[Context], int], needs: tuple[Need, ...] = ()
) -> None:
    memory = MEMORY_TYPES[like]

    def run(ctx: Context) -> None:
        start = make(ctx)
        ctx.open(Feature(0))
        for bits in range(1, 8):
            check_mask(ctx, memory, RegisterMode(bits), start, memory.page_size)
            ctx.ioctl("UNREGISTER", start, memory.page_size)

    case(
        f"UFFDIO_REGISTER.ok.mask-of-{name}",
        origin=ORIGIN,
        memory=ANY,
        needs=needs,
        variants=MASK_VARIANTS,
        summary=f"{what} has the same ioctls as {like} in every mode",
    )(run)


_add_kind("stack", "A mapping that grows down, as stacks do,", "anon", _stack)
_add_kind("dev-zero", "A private mapping of /dev/zero", "anon", _dev_zero)
_add_kind("shared-anonymous", "MAP_SHARED | MAP_ANONYMOUS", "shmem", _shared_anonymous)
_add_kind("dev-shm", "A file in /dev/shm", "shmem", _dev_shm)
_add_kind(
    "map-hugetlb", "MAP_HUGETLB", "hugetlb-private", _map_hugetlb, needs=(needs_hugepages(1),)
)


@case(
    "UFFDIO_REGISTER.ok.mask-disk-file",
    origin=ORIGIN,
    memory=ANY,
    features=Feature.WP_ASYNC,
    variants=MASK_VARIANTS,
)
def disk_file(ctx: Context) -> None:
    """With WP_ASYNC and mode WP, a file on a disk has the same ioctls as anonymous memory."""
    start = disk_page(ctx, mmap.MAP_SHARED)
    ctx.open()
    check_mask(ctx, MEMORY_TYPES["anon"], RegisterMode.WP, start, SMALL_PAGE)


@case(
    "UFFDIO_REGISTER.EINVAL.special-mapping",
    origin="include/linux/userfaultfd_k.h: vma_can_userfault",
    memory=ANY,
)
def special(ctx: Context) -> None:
    """The vDSO can be neither registered nor unregistered."""
    start, end = special_mapping(ctx, "vdso")
    ctx.open()
    for mode in range(1, 8):
        answer = ctx.ioctl("REGISTER", start, end - start, mode)
        ctx.expect(f"errno of REGISTER, mode {mode}", answer.errno, errno.EINVAL)
    answer = ctx.ioctl("UNREGISTER", start, end - start)
    ctx.expect("errno of UNREGISTER", answer.errno, errno.EINVAL)
