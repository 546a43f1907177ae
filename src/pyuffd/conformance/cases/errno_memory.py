"""ENOMEM: no memory for page tables, pages or mappings (layer L5).

Each shortage concerns one process only: a memory control group, a small file system, or the limit
of mappings.  `_left_out` lists the cases that would need a shortage on the whole machine.
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
BUDGET_S = 60.0  # the case starts a Python process, perhaps on a slow machine
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_NORESERVE = 0x4000
PROT_NONE = 0
REPLACE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
# The register mode that each ioctl needs.
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
            # Kernels without WP_UNPOPULATED report success, and a WARN in the log.
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
_NO_MEMORY = "Without memory for {} the call changes nothing; with memory it succeeds"
_LACKS = {
    "page": "the page",
    "page-table": "a page table",
    "anon-vma": "an anon_vma",
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
        noisy=True,  # with cgroup v2 the kernel logs that the OOM killer found nothing to kill
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


# Upper levels of the page tables. The page to fill is the first that such a table maps, so that it
# needs a table of its own.
_GIB = 1 << 30
_DIRECTORIES: tuple[tuple[str, str, str, int, bool, str], ...] = (
    ("COPY", "anon", "no-page-middle-directory", _GIB, False, "a PMD table"),
    ("COPY", "anon", "no-page-upper-directory", 512 * _GIB, False, "a PUD table"),
    ("COPY", "hugetlb-private", "no-page-middle-directory", _GIB, False, "a PMD table"),
    ("MOVE", "anon", "no-page-middle-directory", _GIB, False, "a PMD table"),
    ("MOVE", "anon", "src-no-page-table", HUGE_PAGE, True, "a page table of the source"),
    ("MOVE", "anon", "src-no-page-middle-directory", _GIB, True, "a PMD table of the source"),
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
    Variant("none", "a fork that fails sends no event"),
    Variant("told", "the Fork event is sent although the fork fails; fixed in Linux 6.12"),
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
    """A fork that fails while it copies mappings sends no event, and COPY still works."""
    child = ctx.run_child(fork_without_memory, int(Feature.EVENT_FORK))
    code, events, copied = child.value
    ctx.expect("errno of fork", code, errno.ENOMEM)
    ctx.expect("bytes that COPY fills afterwards", copied, ctx.page)
    ctx.expect_variant("events", events, none=0, told=1)


# A full file system


def _sparse(ctx: Context, kind: str, pages: int) -> tuple[int, int]:
    """Map a file larger than its file system; return the addresses of the mapping and a source."""
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
    """COPY into a full file system is ENOMEM; a page copied before that is counted (EAGAIN)."""
    start, source = _sparse(ctx, "tmpfs", 2)
    page = ctx.page
    answer = ctx.ioctl("COPY", start, source, page)
    ctx.expect("errno and result, first page", (answer.errno, answer.result), (0, page))
    answer = ctx.ioctl("COPY", start + page, source, 2 * page)
    ctx.expect("errno and result, two pages", (answer.errno, answer.result), (errno.EAGAIN, page))
    answer = ctx.ioctl("COPY", start + 2 * page, source, page)
    ctx.expect("errno and result of COPY", (answer.errno, answer.result), NO_MEMORY)
    ctx.expect_pagemap(start + 2 * page, "-----")


@case(
    "UFFDIO_ZEROPAGE.ENOMEM.file-system-full",
    origin="mm/shmem.c: shmem_mfill_atomic_pte",
    memory=("shmem",),
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
)
def zeropage_file_system_full(ctx: Context) -> None:
    """ZEROPAGE into a full file system is ENOMEM: zeros of shared memory need a page too."""
    start, _ = _sparse(ctx, "tmpfs", 2)
    page = ctx.page
    answer = ctx.ioctl("ZEROPAGE", start, 2 * page)
    ctx.expect("errno and result, two pages", (answer.errno, answer.result), (0, 2 * page))
    answer = ctx.ioctl("ZEROPAGE", start + 2 * page, page)
    ctx.expect("errno and result of ZEROPAGE", (answer.errno, answer.result), NO_MEMORY)


@case(
    "UFFDIO_COPY.ENOMEM.no-huge-page",
    origin="mm/hugetlb.c: hugetlb_mfill_atomic_pte",
    memory=HUGETLB,
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_hugepages(2)],
    variants=[
        Variant("told", "ENOMEM"),
        Variant(
            "mistaken",
            "EEXIST, as if the page were present, if there is a page table; no feature bit tells,"
            " but pagemap shows a hole",
        ),
    ],
)
def copy_no_huge_page(ctx: Context) -> None:
    """If no huge page is free, COPY fails and the page stays missing."""
    start, source = _sparse(ctx, "hugetlbfs", 2)
    page = ctx.page
    for index in range(2):
        answer = ctx.ioctl("COPY", start + index * page, source, page)
        ctx.expect(
            "errno and result with a free huge page", (answer.errno, answer.result), (0, page)
        )
    where = start + 2 * page
    answer = ctx.ioctl("COPY", where, source, page)
    mistaken = (errno.EEXIST, -errno.EEXIST)
    seen = (answer.errno, answer.result)
    ctx.expect_variant("errno and result of COPY", seen, told=NO_MEMORY, mistaken=mistaken)
    ctx.expect_pagemap(where, "-----")
    access = ctx.start(ctx.read, where)
    ctx.expect_fault(0, where)
    # Make room in the file: now COPY finds the page missing and fills it.
    if ctx.memory.shared:
        _memory.madvise(start, page, mmap.MADV_REMOVE)
    else:  # kernels before 5.18 refuse MADV_DONTNEED of huge pages
        _memory.mmap(page, PROT_NONE, REPLACE, address=start)
    answer = ctx.ioctl("COPY", where, source, page)
    ctx.expect("errno and result with room", (answer.errno, answer.result), (0, page))
    ctx.expect("the read", access.result(), DATA)


# The limit of mappings


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
    """At vm.max_map_count a part of a mapping cannot be registered, but a whole mapping can."""
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
    """At vm.max_map_count a part of a registered mapping cannot be unregistered."""
    _, part, _, _, again = _at_map_limit(ctx)
    ctx.expect("errno of a part", part, errno.ENOMEM)
    ctx.expect("errno of the part afterwards", again, 0)
