"""The resources and limits of this machine, and how to raise them (layer L2)."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress

from pyuffd._arguments import check_int
from pyuffd._describe import human_size
from pyuffd._errors import UffdOSError, memory_limits
from pyuffd._pages import PAGE_SIZE

# Not pathlib, whose import would be a sixth of the import of pyuffd.
PROC = "/proc"
POOLS = "/sys/kernel/mm/hugepages"
MAP_HUGETLB = 0x40000
MAP_NORESERVE = 0x4000  # in the mmap module since Python 3.13
_SPLIT = 2
MFD_HUGETLB = 0x4
SIZE_SHIFT = 26  # MAP_HUGE_SHIFT and MFD_HUGE_SHIFT: log2 of the page size sits above it


def read_text(path: str) -> str:
    """Return what is in a file of procfs or sysfs; names in it need not be UTF-8."""
    with open(path, errors="replace") as file:
        return file.read()


def sizes() -> list[int]:
    """Return the huge page sizes of this machine in bytes, smallest first."""
    prefix, suffix = "hugepages-", "kB"
    try:
        names = os.listdir(POOLS)
    except FileNotFoundError:
        return []
    return sorted(
        int(name.removeprefix(prefix).removesuffix(suffix)) << 10
        for name in names
        if name.startswith(prefix) and name.endswith(suffix)
    )


def page_size_for(huge_page_size: int | None) -> int:
    """Return the page size that a constructor's `huge_page_size` asks for, if it exists here."""
    if huge_page_size is None:
        return PAGE_SIZE
    known = sizes()
    check_int("huge_page_size", huge_page_size)
    if huge_page_size not in known:
        has = ", ".join(map(hex, known)) or "no huge pages"
        raise ValueError(f"huge_page_size {huge_page_size:#x}: this machine has {has}")
    return huge_page_size


def size_bits(page_size: int) -> int:
    """Return the page size as flags of mmap(2) and memfd_create(2)."""
    return (page_size.bit_length() - 1) << SIZE_SHIFT


def free_pages(page_size: int) -> int:
    """Return how many huge pages of this size are neither used nor reserved."""
    reserved = _count(page_size, "resv_hugepages")
    if reserved >> 63:
        reserved = 0  # below zero, shown as unsigned: Linux 6.18 counts one too few at times
    return _count(page_size, "free_hugepages") - reserved


def shortage(page_size: int, needed: int, fd: int) -> str:
    """Return how many huge pages are free and needed, and the command that adds the rest."""
    total, free = _count(page_size, "nr_hugepages"), free_pages(page_size)
    kib = page_size >> 10
    needs = "1 is needed" if needed == 1 else f"{needed} are needed"
    text = f"{free} of {total} huge pages of {kib} KiB are free, {needs}"
    if free < needed:
        wanted = total + needed - free
        memory = _meminfo("MemTotal")
        if wanted * page_size > memory:
            asked, has = (size / (1 << 30) for size in (wanted * page_size, memory))
            return f"{text}: a pool of {asked:.1f} GiB, this machine has {has:.1f} GiB of memory"
        if page_size == _meminfo("Hugepagesize"):
            return f"{text}: `sysctl vm.nr_hugepages={wanted}`"
        return f"{text}: `echo {wanted} > {_pool(page_size)}/nr_hugepages`"
    if fd >= 0:
        mount = os.fstatvfs(fd)
        if mount.f_blocks:
            left = f"{mount.f_bfree} of its {mount.f_blocks} pages left"
            text += f"; the mount has {left}: use one with a larger size="
    return text


def why_no_memory(length: int, *, accounted: bool) -> str:
    """Return the limit that a mapping with ENOMEM met, and how to raise it; "" if unknown.

    `accounted`: the kernel counts the mapping's memory as committed, because it is private and
    writable and not mapped with MAP_NORESERVE.
    """
    with suppress(OSError, ValueError, KeyError, MemoryError):
        return next(_memory_limits(length, accounted), "")
    return ""


def _memory_limits(length: int, accounted: bool) -> Iterator[str]:
    yield from memory_limits(length)
    if problem := too_many_mappings():
        yield problem
    mode = read_text(f"{PROC}/sys/vm/overcommit_memory").strip()
    if mode == "2":
        limit, committed = _meminfo("CommitLimit"), _meminfo("Committed_AS")
        if accounted and committed + length > limit:
            yield (
                f"vm.overcommit_memory is 2, and {human_size(committed)} of {human_size(limit)} are"
                " committed: `sysctl vm.overcommit_memory=0`, or a higher vm.overcommit_ratio"
                " (noreserve=True is ignored in this mode)"
            )
    elif accounted and length > (total := _meminfo("MemTotal") + _meminfo("SwapTotal")):
        yield (
            f"vm.overcommit_memory is {mode}, which refuses a mapping larger than the"
            f" {human_size(total)} of memory and swap: use noreserve=True, or"
            " `sysctl vm.overcommit_memory=1`"
        )
    yield f"the address space may have no gap of {human_size(length)}"


def too_many_mappings(pid: int | str = "self") -> str:
    """Return that a process has as many mappings as vm.max_map_count allows; else ""."""
    limit = int(read_text(f"{PROC}/sys/vm/max_map_count"))
    with open(f"{PROC}/{pid}/maps", "rb") as maps:
        count = sum(1 for _ in maps)
    # Registering the middle of a mapping splits it into three, so the kernel refuses earlier.
    if count + _SPLIT < limit:
        return ""
    return (
        f"there are {count} mappings, and vm.max_map_count is {limit}: join ranges, or"
        f" `sysctl vm.max_map_count={2 * limit}`"
    )


def why_locked() -> str:
    """Return the hint for EAGAIN of mmap(2): new mappings are locked in memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return (
        "new mappings are locked in memory (mlockall), and RLIMIT_MEMLOCK is"
        f" {human_size(limit)}: raise it (`ulimit -l`), or unlock them (munlockall)"
    )


def why_no_procfs() -> str:
    """Return how to get procfs if none is mounted; else ""."""
    if os.path.exists(f"{PROC}/self"):
        return ""
    return "procfs is not mounted (in a chroot?): `mount -t proc proc /proc`"


def raise_without_procfs(op: str, error: OSError) -> None:
    """Raise an error that says so if a file of /proc is missing because no procfs is mounted."""
    if error.errno == errno.ENOENT and (hint := why_no_procfs()):
        raise UffdOSError(errno.ENOENT, op, hint=hint) from None


def swap_problem() -> str:
    """Return why nothing can be swapped out, or an empty string."""
    if _meminfo("SwapFree"):
        return ""
    if total := _meminfo("SwapTotal"):
        return f"all {total >> 20} MiB of swap are used"
    return "this machine has no swap: `swapon FILE` (see mkswap(8)) provides it"


def _pool(page_size: int) -> str:
    return f"{POOLS}/hugepages-{page_size >> 10}kB"


def _count(page_size: int, name: str) -> int:
    try:
        return int(read_text(f"{_pool(page_size)}/{name}"))
    except FileNotFoundError:
        return 0


def status() -> dict[str, int]:
    """Return the sizes of /proc/self/status in bytes."""
    sizes = {}
    for line in read_text(f"{PROC}/self/status").splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[key] = int(value.split()[0]) << 10
    return sizes


def _meminfo(key: str) -> int:
    for line in read_text(f"{PROC}/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0
