"""What the kernel counts for pages that ioctls fill: of a process, a file, a file system (L5).

A call that fails must give back what it has taken, or a file system is full one day, and a control
group at its limit.
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
# Counters of a control group go by batches.
NOISE = 4 << 20


# Of a process


def _counts() -> dict[str, int]:
    """Return what /proc/self/status says this process has in memory, in bytes."""
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
            source.close()  # so that pages which have other content are free
        before = _counts()
        answer = ctx.ioctl(op.name, *op.words(region.start, from_, region.length, 0))
        ctx.expect("errno and result", (answer.errno, answer.result), (0, region.length))
        _expect_change(ctx, "filling", before, {_counted_as(op, ctx.memory): region.length})
        if op in (COPY, MOVE):
            numbers = [
                int.from_bytes(region.read(at, 4), "little")
                for at in range(0, region.length, SMALL_PAGE)
            ]
            wanted = list(range(len(numbers)))
            ctx.expect("every page is where it belongs", numbers == wanted, True)
        elif op is ZEROPAGE:
            ctx.expect("every byte is 0", region.read() == bytes(region.length), True)
        filled = _counts()
        region.close()
        name = "RssAnon" if op is MOVE else _counted_as(op, ctx.memory)
        _expect_change(ctx, "unmapping", filled, {name: -pages * ctx.page})

    case(
        f"UFFDIO_{op.name}.ok.counted",
        summary="Its pages are counted as what they are, and not any more when they are unmapped",
        origin="mm/userfaultfd.c: inc_mm_counter; mm/hugetlb.c: hugetlb_count_add",
        memory=op.memory,
        features=op.features,
    )(run)


def _expect_change(ctx: Context, what: str, before: dict[str, int], wanted: dict[str, int]) -> None:
    """Compare counters; those of small pages may be off by what each CPU has in hand."""
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


# Of a file


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
        ctx.expect("errno", call(0, 2), 0)
        blocks("after two", 2)
        ctx.expect("errno of the same", call(0, 1), errno.EEXIST)
        blocks("after EEXIST", 2)
        if op is COPY:
            _memory.mprotect(source.start, source.length, 0)
            ctx.expect("errno without a source", call(2, 1), errno.EFAULT)
            blocks("after EFAULT", 2)
        _memory.fallocate(fd, PUNCH_HOLE, 0, ctx.page)
        blocks("after a hole was punched", 1)

    case(
        f"UFFDIO_{op.name}.ok.file-blocks",
        summary="The file has as many blocks as it has pages, whatever failed in between",
        origin="mm/shmem.c: shmem_mfill_atomic_pte; mm/hugetlb.c: hugetlb_mfill_atomic_pte",
        memory=memory,
        features=op.features,
    )(run)


_add_blocks(COPY, SHARED)
_add_blocks(ZEROPAGE, ("shmem",))


# Of a file system


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
    """A COPY that fails leaves as much room in the file system as there was."""
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
        ctx.expect(f"pages of room {when}", seen.f_bfree * seen.f_bsize // page, pages)

    room("at first", ROOM)
    source.fill(1)
    ctx.expect("errno", copy(0), 0)
    room("after one", ROOM - 1)
    # In the file, and no more in the page table.
    _memory.madvise(start, page, mmap.MADV_DONTNEED)
    ctx.expect("errno of the same", copy(0, times=2 * ROOM), errno.EEXIST)
    ctx.expect("errno, cold", copy(0, times=2 * ROOM, is_cold=True), errno.EEXIST)
    room("after EEXIST", ROOM - 1)
    ctx.expect("errno, no source", copy(1, GAP, 2 * ROOM), errno.EFAULT)
    room("after EFAULT", ROOM - 1)
    ctx.expect("errno, cold source", copy(1, is_cold=True), 0)
    ctx.expect("errno of the last", copy(2), 0)
    room("when it is full", 0)
    full = copy(3, times=2 * ROOM)
    ctx.expect("it fails when it is full", full in (errno.ENOMEM, errno.EEXIST), True)
    _memory.fallocate(file, PUNCH_HOLE, page, page)
    room("after a hole was punched", 1)
    ctx.expect("errno of another", copy(3), 0)


@case(
    "UFFDIO_COPY.ok.keeps-reservation",
    origin="mm/hugetlb.c: alloc_hugetlb_folio, restore_reserve_on_error, hugetlb_unreserve_pages",
    memory=HUGETLB,
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(2 * ROOM)],
)
def keeps_reservation(ctx: Context) -> None:
    """Huge pages that a mapping has reserved are there for COPY, whatever failed before."""
    page = ctx.page
    file = ctx.enter(small_file_system("hugetlbfs", ROOM * page))
    os.ftruncate(file, ROOM * page)

    def room(when: str, pages: int) -> None:
        seen = os.fstatvfs(file)
        ctx.expect(f"pages of room {when}", seen.f_bfree * seen.f_bsize // page, pages)

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
            source.madvise(mmap.MADV_DONTNEED)  # COPY lets go of its page, and takes another
        seen += [_raw.ioctl(ctx.uffd, "COPY", at, source.start, page).errno for _ in range(2)]
        wanted = [errno.EFAULT, errno.EFAULT, 0, errno.EEXIST]
        ctx.expect(f"errnos of page {index}", seen, wanted)
        room(f"after page {index}", 0)
    _memory.munmap(start, ROOM * page)
    room("unmapped", 0 if ctx.memory.shared else ROOM)
    os.ftruncate(file, 0)
    room("at last", ROOM)


@case(
    "UFFDIO_CONTINUE.EEXIST.page-is-freed",
    origin="mm/hugetlb.c: hugetlb_mfill_atomic_pte, folio_put",
    memory=HUGETLB,
    features=minor_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(ROOM)],
)
def continue_lets_go(ctx: Context) -> None:
    """A huge page that a failing CONTINUE has met is free when its file has let go of it."""
    page = ctx.page
    file = ctx.enter(small_file_system("hugetlbfs", ROOM * page))
    os.ftruncate(file, page)
    with Region.file(file, page) as view:
        view.fill(1)
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    start = _memory.mmap(page, READ_WRITE, flags | MAP_NORESERVE, file)
    ctx.open().register(start, page, mode=RegisterMode.MINOR)
    codes = [ctx.ioctl("CONTINUE", start, page).errno for _ in range(3)]
    ctx.expect("errnos", codes, [0, errno.EEXIST, errno.EEXIST])
    ctx.expect("byte", ctx.silently(ctx.read, start), b"\1")
    _memory.munmap(start, page)
    os.ftruncate(file, 0)
    seen = os.fstatvfs(file)
    ctx.expect("pages of room", seen.f_bfree * seen.f_bsize // page, ROOM)


# Of a control group


def _growth(ctx: Context, act: Callable[[], None]) -> None:
    """Fail if what is done leaves memory charged to the control group, beyond noise."""
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
    """COPY onto a page that is there frees the page that it had filled, thousands of times."""
    region, source = ctx.make(2), ctx.make(1, "anon")
    source.fill(1)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, bytes([1]) * SMALL_PAGE)
    words = (region.start, source.start, SMALL_PAGE)

    def fail() -> None:
        codes = {_raw.ioctl(ctx.uffd, "COPY", *words).errno for _ in range(TIMES)}
        ctx.expect("errnos", codes, {errno.EEXIST})

    _growth(ctx, fail)


@case(
    "UFFDIO_CONTINUE.EEXIST.page-can-go",
    origin="mm/userfaultfd.c: mfill_atomic_pte_continue, folio_put",
    memory=SHMEM,
    features=minor_features,
    needs=[needs_memcg()],
)
def continued_can_go(ctx: Context) -> None:
    """Pages that a failing CONTINUE has met are freed with their file, thousands of them."""
    ctx.open()

    def fail() -> None:
        region = ctx.make(TIMES)
        in_page_cache(region, 1)
        ctx.uffd.register(region, mode=RegisterMode.MINOR)
        ctx.uffd.continue_(region)
        pages = range(region.start, region.start + region.length, SMALL_PAGE)
        codes = {_raw.ioctl(ctx.uffd, "CONTINUE", at, SMALL_PAGE).errno for at in pages}
        ctx.expect("errnos", codes, {errno.EEXIST})
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
    """Pages that MOVE has found pinned are freed afterwards, thousands of them."""
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
        ctx.expect("errnos", codes, {errno.EBUSY})
        pin.drop(syscall, ring)
        os.close(ring)
        source.close()

    _growth(ctx, fail)
