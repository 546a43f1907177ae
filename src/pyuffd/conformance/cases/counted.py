"""How filled pages are counted: by process, file, file system and control group (layer L5).

A call that fails must give back what it has taken. Otherwise a file system fills up, or a control
group reaches its limit.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._memcg import limited_memory, memory_group, needs_memcg
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._starve import small_file_system
from pyuffd.conformance._types import (
    ANON,
    HUGETLB,
    SHARED,
    SHMEM,
    SMALL,
    minor_features,
    missing_features,
)
from pyuffd.conformance._wp import MAP_NORESERVE, PUNCH_HOLE, READ_WRITE, in_page_cache
from pyuffd.conformance.cases.errno_fill import (
    CONTINUE,
    COPY,
    MOVE,
    OPS,
    POISON,
    ZEROPAGE,
    Op,
    fill_file,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_hugepages, needs_privilege

MISSING = RegisterMode.MISSING
MANY, FEW = 1024, 2  # pages, small and huge
BLOCK = 512  # st_blocks of stat(2)
TIMES = 3000
# The kernel updates the counters of a control group in batches.
NOISE = 4 << 20


# Counters of a process


def _counts() -> dict[str, int]:
    """Return the RSS counters and HugetlbPages of /proc/self/status, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Rss") or name == "HugetlbPages":
            found[name] = int(value.split()[0]) << 10
    return found


def _counted_as(op: Op, memory: MemoryType) -> str:
    """Return the counter that an operation's pages add to, or ""."""
    if op is POISON or op is MOVE:
        return ""
    if memory.is_hugetlb:
        return "HugetlbPages"
    if op is ZEROPAGE and not memory.shared:
        return ""
    return "RssShmem" if memory.shared or op is CONTINUE else "RssAnon"


def _add_counted(op: Op) -> None:
    def run(ctx: Context) -> None:
        pages = FEW if ctx.memory.is_hugetlb else MANY
        region = ctx.make(pages)
        if op is CONTINUE:
            fill_file(ctx, region)
        source = ctx.make(region.length // SMALL_PAGE, "anon")
        source.madvise(mmap.MADV_DONTFORK)
        source.fill(1)
        for index in range(source.length // SMALL_PAGE):
            source.write(index * SMALL_PAGE, index.to_bytes(4, "little"))
        ctx.register(region, op.mode)
        from_ = source.start
        if op is ZEROPAGE:
            source.close()  # so that the kernel may take freed pages with other content
        before = _counts()
        answer = ctx.ioctl(op.name, *op.words(region.start, from_, region.length, 0))
        ctx.expect(
            f"errno and result of {op.name}", (answer.errno, answer.result), (0, region.length)
        )
        _expect_change(ctx, "filling", before, {_counted_as(op, ctx.memory): region.length})
        if op in (COPY, MOVE):
            numbers = [
                int.from_bytes(region.read(at, 4), "little")
                for at in range(0, region.length, SMALL_PAGE)
            ]
            wanted = list(range(len(numbers)))
            ctx.expect("whether every page has its own number", numbers == wanted, True)
        elif op is ZEROPAGE:
            ctx.expect("whether every byte is 0", region.read() == bytes(region.length), True)
        filled = _counts()
        region.close()
        name = "RssAnon" if op is MOVE else _counted_as(op, ctx.memory)
        _expect_change(ctx, "unmapping", filled, {name: -pages * ctx.page})

    case(
        f"UFFDIO_{op.name}.ok.counted",
        summary="Filled pages are added to the right counter, and subtracted when unmapped",
        origin="mm/userfaultfd.c: inc_mm_counter; mm/hugetlb.c: hugetlb_count_add",
        memory=op.memory,
        features=op.features,
    )(run)


def _expect_change(ctx: Context, what: str, before: dict[str, int], wanted: dict[str, int]) -> None:
    """Compare counters; those of small pages may lag, since each CPU batches its changes."""
    after = _counts()
    for name, old in before.items():
        change, want = after[name] - old, wanted.get(name, 0)
        slack = 0 if name == "HugetlbPages" else MANY * SMALL_PAGE // 4
        text = f"change of {name} by {what}, in KiB"
        if abs(change - want) > slack:
            ctx.fail(text, str(change >> 10), str(want >> 10))
        ctx.note(f"{text}: {change >> 10}")


for _op in OPS:
    _add_counted(_op)


# Blocks of a file


def _add_blocks(op: Op, memory: tuple[str, ...]) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(4)
        assert region.fd is not None
        fd = region.fd
        source = ctx.make(2 * ctx.page // SMALL_PAGE, "anon")
        source.fill(1)
        ctx.register(region, MISSING)

        def blocks(when: str, pages: int) -> None:
            seen = os.fstat(fd).st_blocks * BLOCK // ctx.page
            ctx.expect(f"pages of the file {when}", seen, pages)

        def call(at: int, pages: int) -> int:
            length = pages * ctx.page
            words = op.words(region.start + at * ctx.page, source.start, length, 0)
            return ctx.ioctl(op.name, *words).errno

        blocks("at first", 0)
        ctx.expect("errno of two pages", call(0, 2), 0)
        blocks("after two", 2)
        ctx.expect("errno of the first page again", call(0, 1), errno.EEXIST)
        blocks("after EEXIST", 2)
        if op is COPY:
            _memory.mprotect(source.start, source.length, 0)
            ctx.expect("errno without a source", call(2, 1), errno.EFAULT)
            blocks("after EFAULT", 2)
        _memory.fallocate(fd, PUNCH_HOLE, 0, ctx.page)
        blocks("after a hole was punched", 1)

    case(
        f"UFFDIO_{op.name}.ok.file-blocks",
        summary="The blocks of a file match its pages, also after calls that failed",
        origin="mm/shmem.c: shmem_mfill_atomic_pte; mm/hugetlb.c: hugetlb_mfill_atomic_pte",
        memory=memory,
        features=op.features,
    )(run)


_add_blocks(COPY, SHARED)
_add_blocks(ZEROPAGE, ("shmem",))


# Free space of a file system


ROOM = 3  # pages that the file system holds
GAP = 0x100000  # nothing is mapped there


@case(
    "UFFDIO_COPY.ok.gives-room-back",
    origin="mm/shmem.c: shmem_inode_unacct_blocks; mm/hugetlb.c: restore_reserve_on_error",
    memory=SHARED,
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(ROOM + 1)],
)
def gives_room_back(ctx: Context) -> None:
    """A COPY that fails does not change the free space of the file system."""
    page = ctx.page
    file = ctx.enter(
        small_file_system("hugetlbfs" if ctx.memory.is_hugetlb else "tmpfs", ROOM * page)
    )
    length = 2 * ROOM * page
    os.ftruncate(file, length)
    flags = mmap.MAP_SHARED | MAP_NORESERVE
    start = _memory.mmap(length, READ_WRITE, flags, file)
    ctx.callback(_memory.munmap, start, length)
    source = ctx.make(page // SMALL_PAGE, "anon")
    ctx.open().register(start, length, mode=MISSING)

    def copy(at: int, from_: int = 0, times: int = 1, *, is_cold: bool = False) -> int:
        code = 0
        for _ in range(times):
            if is_cold:
                source.madvise(mmap.MADV_DONTNEED)
            words = (start + at * page, from_ or source.start, page)
            code = _raw.ioctl(ctx.uffd, "COPY", *words).errno
        return code

    def room(when: str, pages: int) -> None:
        seen = os.fstatvfs(file)
        ctx.expect(f"free pages {when}", seen.f_bfree * seen.f_bsize // page, pages)

    room("at first", ROOM)
    source.fill(1)
    ctx.expect("errno of the first page", copy(0), 0)
    room("after one", ROOM - 1)
    # The page stays in the file, but is no longer mapped.
    _memory.madvise(start, page, mmap.MADV_DONTNEED)
    ctx.expect("errno of the first page again", copy(0, times=2 * ROOM), errno.EEXIST)
    ctx.expect(
        "errno of the first page again, cold source",
        copy(0, times=2 * ROOM, is_cold=True),
        errno.EEXIST,
    )
    room("after EEXIST", ROOM - 1)
    ctx.expect("errno of the second page, unmapped source", copy(1, GAP, 2 * ROOM), errno.EFAULT)
    room("after EFAULT", ROOM - 1)
    ctx.expect("errno of the second page, cold source", copy(1, is_cold=True), 0)
    ctx.expect("errno of the last page that fits", copy(2), 0)
    room("when it is full", 0)
    full = copy(3, times=2 * ROOM)
    ctx.expect(
        "whether COPY fails when the file system is full",
        full in (errno.ENOMEM, errno.EEXIST),
        True,
    )
    _memory.fallocate(file, PUNCH_HOLE, page, page)
    room("after a hole was punched", 1)
    ctx.expect("errno of another page", copy(3), 0)


@case(
    "UFFDIO_COPY.ok.keeps-reservation",
    origin="mm/hugetlb.c: alloc_hugetlb_folio, restore_reserve_on_error, hugetlb_unreserve_pages",
    memory=HUGETLB,
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(2 * ROOM)],
)
def keeps_reservation(ctx: Context) -> None:
    """COPY can use all huge pages that a mapping has reserved, also after calls that failed."""
    page = ctx.page
    file = ctx.enter(small_file_system("hugetlbfs", ROOM * page))
    os.ftruncate(file, ROOM * page)

    def room(when: str, pages: int) -> None:
        seen = os.fstatvfs(file)
        ctx.expect(f"free pages {when}", seen.f_bfree * seen.f_bsize // page, pages)

    room("at first", ROOM)
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    start = _memory.mmap(ROOM * page, READ_WRITE, flags, file)
    source = ctx.make(page // SMALL_PAGE, "anon")
    source.fill(1)
    ctx.open().register(start, ROOM * page, mode=MISSING)
    room("when all are reserved", 0)
    for index in range(ROOM):
        at = start + index * page
        seen = [_raw.ioctl(ctx.uffd, "COPY", at, GAP, page).errno for _ in range(2)]
        if index:
            source.madvise(mmap.MADV_DONTNEED)  # COPY frees its huge page and allocates another
        seen += [_raw.ioctl(ctx.uffd, "COPY", at, source.start, page).errno for _ in range(2)]
        wanted = [errno.EFAULT, errno.EFAULT, 0, errno.EEXIST]
        ctx.expect(f"errnos of page {index}", seen, wanted)
        room(f"after page {index}", 0)
    _memory.munmap(start, ROOM * page)
    room("after munmap", 0 if ctx.memory.shared else ROOM)
    os.ftruncate(file, 0)
    room("after truncation", ROOM)


@case(
    "UFFDIO_CONTINUE.EEXIST.page-is-freed",
    origin="mm/hugetlb.c: hugetlb_mfill_atomic_pte, folio_put",
    memory=HUGETLB,
    features=minor_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(ROOM)],
)
def continue_lets_go(ctx: Context) -> None:
    """A CONTINUE that fails keeps no reference: truncation frees the huge page."""
    page = ctx.page
    file = ctx.enter(small_file_system("hugetlbfs", ROOM * page))
    os.ftruncate(file, page)
    with Region.file(file, page) as view:
        view.fill(1)
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    start = _memory.mmap(page, READ_WRITE, flags | MAP_NORESERVE, file)
    ctx.open().register(start, page, mode=RegisterMode.MINOR)
    codes = [ctx.ioctl("CONTINUE", start, page).errno for _ in range(3)]
    ctx.expect("errnos of CONTINUE", codes, [0, errno.EEXIST, errno.EEXIST])
    ctx.expect("byte", ctx.silently(ctx.read, start), b"\1")
    _memory.munmap(start, page)
    os.ftruncate(file, 0)
    seen = os.fstatvfs(file)
    ctx.expect("free pages after truncation", seen.f_bfree * seen.f_bsize // page, ROOM)


# Memory charged to a control group


def _growth(ctx: Context, act: Callable[[], None]) -> None:
    """Fail if `act` leaves memory charged to the control group, beyond noise."""
    with limited_memory(1 << 40):
        _, group = memory_group()
        names = ("memory.current", "memory.usage_in_bytes")
        usage = next(group / name for name in names if (group / name).exists())
        before = int(usage.read_text())
        act()
        grown = int(usage.read_text()) - before
    if grown > NOISE:
        ctx.fail("memory that was not freed", f"{grown >> 20} MiB", f"less than {NOISE >> 20} MiB")


@case(
    "UFFDIO_COPY.EEXIST.frees-its-page",
    origin="mm/userfaultfd.c: mfill_atomic_pte_copy; mm/shmem.c: shmem_mfill_atomic_pte",
    memory=SMALL,
    features=missing_features,
    needs=[needs_memcg()],
)
def frees_its_page(ctx: Context) -> None:
    """COPY to a page that is present frees the page that it has allocated (3000 times)."""
    region, source = ctx.make(2), ctx.make(1, "anon")
    source.fill(1)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, bytes([1]) * SMALL_PAGE)
    words = (region.start, source.start, SMALL_PAGE)

    def fail() -> None:
        codes = {_raw.ioctl(ctx.uffd, "COPY", *words).errno for _ in range(TIMES)}
        ctx.expect("errnos of COPY", codes, {errno.EEXIST})

    _growth(ctx, fail)


@case(
    "UFFDIO_CONTINUE.EEXIST.page-can-go",
    origin="mm/userfaultfd.c: mfill_atomic_pte_continue, folio_put",
    memory=SHMEM,
    features=minor_features,
    needs=[needs_memcg()],
)
def continued_can_go(ctx: Context) -> None:
    """A CONTINUE that fails keeps no reference: closing the file frees its pages (3000 of them)."""
    ctx.open()

    def fail() -> None:
        region = ctx.make(TIMES)
        in_page_cache(region, 1)
        ctx.uffd.register(region, mode=RegisterMode.MINOR)
        ctx.uffd.continue_(region)
        pages = range(region.start, region.start + region.length, SMALL_PAGE)
        codes = {_raw.ioctl(ctx.uffd, "CONTINUE", at, SMALL_PAGE).errno for at in pages}
        ctx.expect("errnos of CONTINUE", codes, {errno.EEXIST})
        region.close()

    _growth(ctx, fail)


@case(
    "UFFDIO_MOVE.EBUSY.page-can-go",
    origin="mm/userfaultfd.c: move_pages_pte, folio_put",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_memcg(), needs_pin()],
)
def moved_can_go(ctx: Context) -> None:
    """A MOVE that fails keeps no reference: pinned pages are freed afterwards (3000 of them)."""
    region = ctx.make(1)
    ctx.register(region, MISSING)

    def fail() -> None:
        source = ctx.make(TIMES)
        source.advise_thp(False)
        source.madvise(mmap.MADV_DONTFORK)
        source.fill(1)
        pin = Pin(source.start, source.length)
        ring = pin.take(syscall)
        pages = range(source.start, source.start + source.length, SMALL_PAGE)
        codes = {_raw.ioctl(ctx.uffd, "MOVE", region.start, at, SMALL_PAGE).errno for at in pages}
        ctx.expect("errnos of MOVE", codes, {errno.EBUSY})
        pin.drop(syscall, ring)
        os.close(ring)
        source.close()

    _growth(ctx, fail)
