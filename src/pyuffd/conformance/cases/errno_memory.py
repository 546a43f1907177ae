"""ENOMEM: no memory for page tables, pages or mappings (layer L5).

Each shortage is one process's own: a memory control group, a small file system, or the limit of
mappings.  What would take the whole machine's is listed in `_left_out`.
"""

from __future__ import annotations

import errno
import mmap
import os

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._memcg import needs_memcg
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._starve import (
    fill_without_directory,
    fork_without_memory,
    ioctl_without_memory,
    needs_kernel_accounting,
    needs_map_limit,
    register_without_mappings,
    small_file_system,
)
from pyuffd.conformance._types import (
    ANON,
    ANY,
    HUGETLB,
    SHMEM,
    SMALL,
    minor_features,
    missing_features,
    wp_features,
)
from pyuffd.conformance.cases.errno_fill import DATA
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_hugepages, needs_privilege

NO_MEMORY = errno.ENOMEM, -errno.ENOMEM
BUDGET_S = 60.0  # a process of its own is started, perhaps on a slow machine
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_NORESERVE = 0x4000
PROT_NONE = 0
REPLACE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
# For each ioctl, the mode that it needs.
_MODES = {
    "COPY": RegisterMode.MISSING,
    "ZEROPAGE": RegisterMode.MISSING,
    "POISON": RegisterMode.MISSING,
    "MOVE": RegisterMode.MISSING,
    "CONTINUE": RegisterMode.MINOR,
    "WRITEPROTECT": RegisterMode.WP,
}


def _features(name: str, memory: MemoryType) -> Feature:
    match name:
        case "CONTINUE":
            return minor_features(memory)
        case "WRITEPROTECT":
            # Before there was WP_UNPOPULATED the kernel said nothing but WARN.
            return wp_features(memory) | Feature.WP_UNPOPULATED
        case "POISON":
            return missing_features(memory) | Feature.POISON
        case "MOVE":
            return Feature.MOVE
        case _:
            return missing_features(memory)


_STARVED = (
    needs_privilege("CAP_SYS_ADMIN", "CAP_IPC_LOCK"),
    needs_memcg(),
    needs_kernel_accounting(),
)
_NO_MEMORY = "There is no memory for {}: nothing is changed; the next time there is"
_LACKS = {
    "page": "its page",
    "page-table": "a page table",
    "anon-vma": "the kernel's record of who maps private memory",
}


def _add_starved(name: str, memory: tuple[str, ...], lacks: str = "page-table") -> None:
    full = f"UFFDIO_{name}.ENOMEM.no-{lacks}"

    def run(ctx: Context) -> None:
        words = (int(_MODES[name]), int(_features(name, ctx.memory)), lacks)
        child = ctx.run_child(ioctl_without_memory, name, ctx.memory.name, *words)
        first, second = child.value[:2], child.value[2:]
        ctx.expect("errno without memory", first[0], errno.ENOMEM)
        if name != "WRITEPROTECT":
            ctx.expect("result without memory", first[1], -errno.ENOMEM)
            ctx.expect("errno and result with memory", second, [0, ctx.page])
        else:
            ctx.expect("errno with memory", second[0], 0)

    case(
        full,
        origin=f"UFFDIO_{name}(2const): ENOMEM",
        memory=memory,
        features=lambda kind: _features(name, kind),
        needs=_STARVED,
        budget_s=BUDGET_S,
        alone=True,
        noisy=True,  # with control groups of version 2 the kernel tells of a killer without victim
        summary=_NO_MEMORY.format(_LACKS[lacks]),
    )(run)


_add_starved("COPY", SMALL, "page")
_add_starved("COPY", ("anon", "shmem-private"), "anon-vma")
_add_starved("MOVE", ANON, "anon-vma")
_add_starved("COPY", SMALL)
_add_starved("ZEROPAGE", SMALL)
_add_starved("MOVE", ANON)
_add_starved("CONTINUE", SHMEM)
_add_starved("POISON", SMALL)
_add_starved("WRITEPROTECT", SMALL)


# Tables of tables, each at the first address of its own: what lacks it is on the other side of it.
_GIB = 1 << 30
_DIRECTORIES: tuple[tuple[str, str, str, int, bool, str], ...] = (
    ("COPY", "anon", "no-page-middle-directory", _GIB, False, "the table of its page table"),
    ("COPY", "anon", "no-page-upper-directory", 512 * _GIB, False, "the table above that"),
    ("COPY", "hugetlb-private", "no-page-middle-directory", _GIB, False, "its page table"),
    ("MOVE", "anon", "no-page-middle-directory", _GIB, False, "the table of its page table"),
    ("MOVE", "anon", "src-no-page-table", HUGE_PAGE, True, "the page table of a hole"),
    ("MOVE", "anon", "src-no-page-middle-directory", _GIB, True, "the table above that"),
)


def _add_directory(
    name: str, memory: str, what: str, boundary: int, holes: bool, text: str
) -> None:
    def run(ctx: Context) -> None:
        words = (name, ctx.memory.is_hugetlb, boundary, holes)
        child = ctx.run_child(fill_without_directory, *words)
        ctx.expect("errno and result without memory", child.value[:2], [*NO_MEMORY])
        ctx.expect("errno and result with memory", child.value[2:], [0, ctx.page])

    kind = "-hugetlb" if memory == "hugetlb-private" else ""
    case(
        f"UFFDIO_{name}.ENOMEM.{what}{kind}",
        origin="mm/userfaultfd.c: mm_alloc_pmd",
        memory=(memory,),
        features=lambda kind: _features(name, kind),
        needs=_STARVED,
        budget_s=BUDGET_S,
        alone=True,
        noisy=True,
        summary=_NO_MEMORY.format(text),
    )(run)


for _directory in _DIRECTORIES:
    _add_directory(*_directory)


_EVENT = (
    Variant("none", "nobody is told of a fork that has failed"),
    Variant("told", "the Fork event comes all the same; fixed in Linux 6.12"),
)


@case(
    "fork.ENOMEM.mappings",
    origin="fs/userfaultfd.c: dup_userfaultfd_fail",
    memory=ANY,
    features=Feature.EVENT_FORK,
    needs=[*_STARVED, needs_map_limit()],
    variants=_EVENT,
    budget_s=BUDGET_S,
    alone=True,
    noisy=True,
)
def fork_fails(ctx: Context) -> None:
    """A fork that fails in the middle of the mappings sends no event, and filling goes on."""
    child = ctx.run_child(fork_without_memory, int(Feature.EVENT_FORK))
    code, events, copied = child.value
    ctx.expect("errno", code, errno.ENOMEM)
    ctx.expect("bytes that COPY fills afterwards", copied, ctx.page)
    ctx.expect_variant("events", events, none=0, told=1)


# No page in the file system


def _sparse(ctx: Context, kind: str, pages: int) -> tuple[int, int]:
    """Map more of a file than its file system holds; return its address and that of a source."""
    file = ctx.enter(small_file_system(kind, pages * ctx.page))
    length = 2 * pages * ctx.page
    os.ftruncate(file, length)
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    start = _memory.mmap(length, READ_WRITE, flags | MAP_NORESERVE, file)
    ctx.callback(_memory.munmap, start, length)
    source = ctx.make(2 * ctx.page // SMALL_PAGE, "anon")
    source.fill(DATA[0])
    ctx.open()
    ctx.callback(ctx.uffd.close)
    ctx.uffd.register(start, length, mode=RegisterMode.MISSING)
    return start, source.start


@case(
    "UFFDIO_COPY.ENOMEM.file-system-full",
    origin="mm/shmem.c: shmem_mfill_atomic_pte",
    memory=("shmem",),
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
)
def copy_file_system_full(ctx: Context) -> None:
    """The file system holds no more pages: ENOMEM, and the page before is counted (EAGAIN)."""
    start, source = _sparse(ctx, "tmpfs", 2)
    page = ctx.page
    answer = ctx.ioctl("COPY", start, source, page)
    ctx.expect("errno and result, first page", (answer.errno, answer.result), (0, page))
    answer = ctx.ioctl("COPY", start + page, source, 2 * page)
    ctx.expect("errno and result, two pages", (answer.errno, answer.result), (errno.EAGAIN, page))
    answer = ctx.ioctl("COPY", start + 2 * page, source, page)
    ctx.expect("errno and result", (answer.errno, answer.result), NO_MEMORY)
    ctx.expect_pagemap(start + 2 * page, "-----")


@case(
    "UFFDIO_ZEROPAGE.ENOMEM.file-system-full",
    origin="mm/shmem.c: shmem_mfill_atomic_pte",
    memory=("shmem",),
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
)
def zeropage_file_system_full(ctx: Context) -> None:
    """The file system holds no more pages, not even of zeros: ENOMEM."""
    start, _ = _sparse(ctx, "tmpfs", 2)
    page = ctx.page
    answer = ctx.ioctl("ZEROPAGE", start, 2 * page)
    ctx.expect("errno and result, two pages", (answer.errno, answer.result), (0, 2 * page))
    answer = ctx.ioctl("ZEROPAGE", start + 2 * page, page)
    ctx.expect("errno and result", (answer.errno, answer.result), NO_MEMORY)


@case(
    "UFFDIO_COPY.ENOMEM.no-huge-page",
    origin="mm/hugetlb.c: hugetlb_mfill_atomic_pte",
    memory=HUGETLB,
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(2)],
    variants=[
        Variant("told", "ENOMEM says so"),
        Variant(
            "mistaken",
            "EEXIST, as if the page were there, once there is a page table; no feature bit tells,"
            " but pagemap shows a hole",
        ),
    ],
)
def copy_no_huge_page(ctx: Context) -> None:
    """No huge page is available: an error, and the page is still missing."""
    start, source = _sparse(ctx, "hugetlbfs", 2)
    page = ctx.page
    for index in range(2):
        answer = ctx.ioctl("COPY", start + index * page, source, page)
        ctx.expect("errno and result, a page there is", (answer.errno, answer.result), (0, page))
    where = start + 2 * page
    answer = ctx.ioctl("COPY", where, source, page)
    mistaken = (errno.EEXIST, -errno.EEXIST)
    seen = (answer.errno, answer.result)
    ctx.expect_variant("errno and result", seen, told=NO_MEMORY, mistaken=mistaken)
    ctx.expect_pagemap(where, "-----")
    access = ctx.start(ctx.read, where)
    ctx.expect_fault(0, where)
    # The same file has room again: now it is told apart from a page that is there.
    if ctx.memory.shared:
        _memory.madvise(start, page, mmap.MADV_REMOVE)
    else:  # which MADV_DONTNEED could not always drop
        _memory.mmap(page, PROT_NONE, REPLACE, address=start)
    answer = ctx.ioctl("COPY", where, source, page)
    ctx.expect("errno and result with room", (answer.errno, answer.result), (0, page))
    ctx.expect("the read", access.result(), DATA)


# No mapping more


def _at_map_limit(ctx: Context) -> list[int]:
    value = ctx.run_child(register_without_mappings).value
    assert isinstance(value, list)
    return value


@case(
    "UFFDIO_REGISTER.ENOMEM.map-limit",
    origin="fs/userfaultfd.c: userfaultfd_register; vm.max_map_count",
    memory=ANY,
    needs=[needs_map_limit()],
    budget_s=BUDGET_S,
)
def register_map_limit(ctx: Context) -> None:
    """At the limit of mappings a part of one cannot be registered, but a whole one can."""
    part, _, whole, again, _ = _at_map_limit(ctx)
    ctx.expect("errno of a part", part, errno.ENOMEM)
    ctx.expect("errno of a whole mapping", whole, 0)
    ctx.expect("errno of the part afterwards", again, 0)


@case(
    "UFFDIO_UNREGISTER.ENOMEM.map-limit",
    origin="fs/userfaultfd.c: userfaultfd_unregister; vm.max_map_count",
    memory=ANY,
    needs=[needs_map_limit()],
    budget_s=BUDGET_S,
)
def unregister_map_limit(ctx: Context) -> None:
    """At the limit of mappings a part of a registered one cannot be unregistered."""
    _, part, _, _, again = _at_map_limit(ctx)
    ctx.expect("errno of a part", part, errno.ENOMEM)
    ctx.expect("errno of the part afterwards", again, 0)
