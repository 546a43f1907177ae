"""Which page of a file the filling ioctls fill, and with which access rights (layer L5).

A page is filled at the right offset of the file and with the rights of the mapping. A private
mapping leaves the file alone. A file that ends inside a page has that page.
"""

from __future__ import annotations

import errno
import mmap
import os

from pyuffd import _memory
from pyuffd._abi import RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._raw import Answer
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.conformance._types import FILE, SHMEM, SMALL, minor_features, missing_features
from pyuffd.conformance._wp import (
    IN_FILE,
    MISSING_READ,
    READ_WRITE,
    WRITTEN,
    expect_fault,
    expect_read,
    frame,
    in_one_place,
    in_page_cache,
    page_out,
)
from pyuffd.conformance.cases.errno_fill import (
    CONTINUE,
    COPY,
    DATA,
    POISON,
    ZEROPAGE,
    Op,
    Target,
    fill_file,
)
from pyuffd.conformance.cases.waiters import MINOR_READ
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_privilege, needs_swap, needs_thp

MISSING, MINOR = RegisterMode.MISSING, RegisterMode.MINOR
PAGES, FIRST = 4, 2  # of the file, and the first one that is mapped
SIGSEGV = 11
SYS_MLOCK2, MLOCK_ONFAULT = 325, 1
KPF_MLOCKED = 1 << 33  # include/linux/kernel-page-flags.h


# Locked memory


@case(
    "UFFDIO_COPY.ok.locked",
    origin="mm/userfaultfd.c: mfill_atomic_install_pte, folio_add_lru_vma",
    # Before Linux 5.18, file pages are marked only by reclaim.
    memory=("anon", "shmem-private"),
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
)
def locked(ctx: Context) -> None:
    """A page that COPY fills in memory locked by mlock2(2) is locked too."""
    region = ctx.make(1)
    answer = syscall(SYS_MLOCK2, region.start, region.length, MLOCK_ONFAULT)
    ctx.expect("mlock2", answer, 0)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, DATA * ctx.page)
    with open("/proc/kpageflags", "rb", buffering=0) as flags:
        found = os.pread(flags.fileno(), 8, 8 * frame(region.start))
    is_locked = int.from_bytes(found, "little") & KPF_MLOCKED != 0
    ctx.expect("whether the page has KPF_MLOCKED", is_locked, True)


# A mapping that begins at an offset in its file


def _later_part(ctx: Context) -> tuple[Region, int]:
    """Make a file, and map its last two pages; return the file's region and the address."""
    file = ctx.make(PAGES)
    assert file.fd is not None
    length = (PAGES - FIRST) * ctx.page
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    start = _memory.mmap(length, READ_WRITE, flags, file.fd, FIRST * ctx.page)
    ctx.callback(_memory.munmap, start, length)
    return file, start


def _pages_of(ctx: Context, file: Region) -> list[int]:
    """Return the numbers of the pages that a file of small pages has."""
    assert file.fd is not None
    found: list[int] = []
    at = 0
    while True:
        try:
            at = os.lseek(file.fd, at, os.SEEK_DATA)
        except OSError:  # no more
            return found
        found.append(at // ctx.page)
        at += ctx.page


def _fill(ctx: Context, op: Op, start: int) -> Answer:
    source = ctx.make(ctx.page // SMALL_PAGE, "anon")
    source.fill(DATA[0])
    return ctx.ioctl(op.name, *op.words(start, source.start, ctx.page, 0))


def _add_offset(op: Op, memory: tuple[str, ...]) -> None:
    def run(ctx: Context) -> None:
        file, start = _later_part(ctx)
        ctx.open().register(start, (PAGES - FIRST) * ctx.page, mode=MISSING)
        answer = _fill(ctx, op, start)
        ctx.expect(f"errno and result of {op.name}", (answer.errno, answer.result), (0, ctx.page))
        if not ctx.memory.is_hugetlb:
            wanted = [FIRST] if ctx.memory.shared else []
            ctx.expect("pages of the file", _pages_of(ctx, file), wanted)
        value = 0 if op is ZEROPAGE else DATA[0]
        expect_read(ctx, start, value)
        if ctx.memory.shared:
            expect_read(ctx, file.start + FIRST * ctx.page, value)

    case(
        f"UFFDIO_{op.name}.ok.file-offset",
        summary="In a mapping that begins inside its file, the right page of the file is filled",
        origin="mm/userfaultfd.c: linear_page_index",
        memory=memory,
        features=op.features,
    )(run)


_add_offset(COPY, FILE)
_add_offset(ZEROPAGE, SHMEM)


def _numbered(ctx: Context, file: Region) -> None:
    assert file.fd is not None
    with Region.file(file.fd, file.length) as view:
        for index in range(PAGES):
            view.fill(index + 1, index * ctx.page, ctx.page)


@case(
    "UFFDIO_CONTINUE.ok.file-offset",
    origin="mm/userfaultfd.c: mfill_atomic_pte_continue",
    memory=FILE,
    features=minor_features,
)
def continue_offset(ctx: Context) -> None:
    """In a mapping that begins inside its file, CONTINUE maps the right page of the file."""
    file, start = _later_part(ctx)
    _numbered(ctx, file)
    ctx.open().register(start, (PAGES - FIRST) * ctx.page, mode=MINOR)
    for index in range(PAGES - FIRST):
        at = start + index * ctx.page
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MINOR_READ, at)
        ctx.uffd.continue_(at, ctx.page)
        ctx.expect("the byte", reading.result(), bytes([FIRST + index + 1]))
        expect_read(ctx, at, FIRST + index + 1)


@case(
    "fault.missing.file-offset",
    origin="mm/shmem.c, mm/hugetlb.c: vmf->pgoff",
    memory=FILE,
    features=missing_features,
)
def fault_offset(ctx: Context) -> None:
    """In a mapping that begins inside its file, the pages that the file lacks are missing."""
    file, start = _later_part(ctx)
    assert file.fd is not None
    with Region.file(file.fd, file.length) as view:
        # The first page of the file, and the second of the mapping.
        view.fill(IN_FILE, 0, ctx.page)
        view.fill(IN_FILE, (FIRST + 1) * ctx.page, ctx.page)
    ctx.open().register(start, (PAGES - FIRST) * ctx.page, mode=MISSING)
    reading = ctx.start(ctx.read, start)
    expect_fault(ctx, reading, MISSING_READ, start)
    ctx.uffd.copy(start, DATA * ctx.page)
    ctx.expect("the byte", reading.result(), DATA)
    expect_read(ctx, start + ctx.page, IN_FILE)


# A file that ends inside its last page


def _add_last_page(op: Op) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op, 3)
        assert target.region.fd is not None
        os.ftruncate(target.region.fd, ctx.page + 100)
        target.expect(0, ctx.page, at=ctx.page)
        beyond = target.call(at=2 * ctx.page)
        ctx.expect("whether the page beyond the end is filled", beyond.errno == 0, False)
        target.expect(errno.EAGAIN, ctx.page, length=3 * ctx.page)

    case(
        f"UFFDIO_{op.name}.ok.last-page-in-part",
        summary="If the file ends inside a page, that page can be filled",
        origin="mm/userfaultfd.c: mfill_file_over_size",
        memory=SHMEM,
        features=op.features,
    )(run)


for _op in (COPY, ZEROPAGE, POISON, CONTINUE):
    _add_last_page(_op)


# The rights of the mapping


def _add_read_only(op: Op) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        if op is CONTINUE:
            fill_file(ctx, region)
        ctx.register(region, op.mode)
        _memory.mprotect(region.start, region.length, mmap.PROT_READ)
        answer = _fill(ctx, op, region.start)
        ctx.expect(f"errno and result of {op.name}", (answer.errno, answer.result), (0, ctx.page))
        value = 0 if op is ZEROPAGE else DATA[0]
        expect_read(ctx, region.start, value)
        seen = ctx.silently(ctx.write, region.start, bytes([WRITTEN]))
        ctx.expect("signal of a write", getattr(seen, "number", None), SIGSEGV)
        expect_read(ctx, region.start, value)
        _memory.mprotect(region.start, region.length, READ_WRITE)
        ctx.expect("a write", ctx.silently(ctx.write, region.start, bytes([WRITTEN])), None)

    case(
        f"UFFDIO_{op.name}.ok.read-only-mapping",
        summary="A page filled in a read-only mapping can be read, but not written",
        origin="mm/userfaultfd.c: mfill_atomic_install_pte; mm/hugetlb.c",
        memory=op.memory,
        features=op.features,
    )(run)


for _op in (COPY, ZEROPAGE, CONTINUE):
    _add_read_only(_op)


# A filled page must be dirty, or reclaim drops it


def _add_reclaimed(op: Op, *, read_only: bool, memory: tuple[str, ...]) -> None:
    def run(ctx: Context) -> None:
        in_one_place(ctx)
        region = ctx.make(1)
        ctx.register(region, op.mode)
        if read_only:
            _memory.mprotect(region.start, region.length, mmap.PROT_READ)
        answer = _fill(ctx, op, region.start)
        ctx.expect(f"errno and result of {op.name}", (answer.errno, answer.result), (0, ctx.page))
        page_out(ctx, region)
        expect_read(ctx, region.start, 0 if op is ZEROPAGE else DATA[0])

    where = "read-only-mapping-reclaimed" if read_only else "reclaimed"
    case(
        f"UFFDIO_{op.name}.ok.{where}",
        summary="A page that is filled and never written keeps its content through reclaim"
        + (", also in a read-only mapping" if read_only else ""),
        origin="mm/userfaultfd.c: mfill_atomic_install_pte, pte_mkdirty",
        memory=memory,
        features=op.features,
        needs=[needs_swap()],
    )(run)


_add_reclaimed(COPY, read_only=True, memory=SMALL)
_add_reclaimed(ZEROPAGE, read_only=False, memory=("shmem",))
_add_reclaimed(ZEROPAGE, read_only=True, memory=("shmem",))


@case(
    "UFFDIO_CONTINUE.ok.private-leaves-file",
    origin="mm/userfaultfd.c: mfill_atomic_install_pte; mm/hugetlb.c",
    memory=("shmem-private", "hugetlb-private"),
    features=minor_features,
)
def private_leaves_file(ctx: Context) -> None:
    """A write to a file page that CONTINUE mapped privately does not change the file."""
    region = ctx.make(1)
    assert region.fd is not None
    in_page_cache(region, IN_FILE)
    ctx.register(region, MINOR)
    ctx.uffd.continue_(region.start, ctx.page)
    ctx.expect("a write", ctx.silently(ctx.write, region.start, bytes([WRITTEN])), None)
    seen = ctx.silently(ctx.read, region.start, 2)
    ctx.expect("content here", seen, bytes([WRITTEN, IN_FILE]))
    with Region.file(region.fd, region.length) as view:
        ctx.expect("content of the file", view.read(0, 2), bytes([IN_FILE]) * 2)


@case(
    "UFFDIO_CONTINUE.ok.pages-of-a-huge-page",
    origin="mm/userfaultfd.c: mfill_atomic_pte_continue, folio_file_page",
    memory=SHMEM,
    features=minor_features,
    needs=[needs_thp()],
)
def pages_of_huge(ctx: Context) -> None:
    """CONTINUE of a part of a file's huge page maps the right small pages."""
    region = ctx.make(HUGE_PAGE // SMALL_PAGE)
    assert region.fd is not None
    ctx.register(region, MINOR)
    with Region.file(region.fd, region.length) as view:
        for index in range(HUGE_PAGE // SMALL_PAGE):
            view.fill(index % 251 + 1, index * SMALL_PAGE, SMALL_PAGE)
        try:
            view.madvise(MADV_COLLAPSE)
        except OSError as error:
            ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")
    for first, count in ((3, 1), (509, 3), (100, 4)):
        ctx.uffd.continue_(region.start + first * SMALL_PAGE, count * SMALL_PAGE)
        for index in range(first, first + count):
            expect_read(ctx, region.start + index * SMALL_PAGE, index % 251 + 1)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MINOR_READ, region.start)
    ctx.uffd.continue_(region.start, SMALL_PAGE)
    ctx.expect("the first byte", reading.result(), b"\1")
