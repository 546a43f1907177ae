"""/proc/PID/pagemap of this process and of others."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import (
    ClosedError,
    Feature,
    PageBit,
    Pagemap,
    ProcessGoneError,
    Region,
    RegisterMode,
    UffdOSError,
    UffdPermissionError,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd.testing import needs, needs_privilege, needs_swap, swap_out
from tests._child import run_child
from tests._memory import PAGE, Memory

TASK_SIZE = 0x7FFF_FFFF_F000
NOBODY = 65534

# A process that maps 8 pages, writes the first two, and prints their address.
OTHER = """
import sys
from pyuffd import Region
with Region.anonymous(8 * 4096) as region:
    region.fill(1, 0, 2 * 4096)
    print(region.start, flush=True)
    sys.stdin.read()
"""


def test_present_pages_of_each_memory_type(memory: Memory) -> None:
    region = memory.pages(4)
    per_page = memory.page_size // PAGE
    with Pagemap() as pagemap:
        assert pagemap.read(region).count(PageBit.PRESENT) == 0
        region.fill(1, memory.page_size, 2 * memory.page_size)
        entries = pagemap.read(region)
        assert len(entries) == 4 * per_page
        assert entries.count(PageBit.PRESENT) == 2 * per_page
        (run,) = entries.where(PageBit.PRESENT | PageBit.MMAP_EXCLUSIVE)
        assert run.start == region.start + memory.page_size
        assert run.end == region.start + 3 * memory.page_size
        assert entries.count(PageBit.FILE) == (2 * per_page if memory.shared else 0)
        assert entries.at(region.start) == PageBit(0)


@needs(Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED)
def test_write_protected_pages(memory: Memory) -> None:
    region = memory.pages(3)
    per_page = memory.page_size // PAGE
    region.touch(0, memory.page_size, write=True)
    with Pagemap() as pagemap, Userfaultfd(features=Feature.WP_UNPOPULATED) as uffd:
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region.start, 2 * memory.page_size)
        entries = pagemap.read(region)
        assert entries.count(PageBit.UFFD_WP) == 2 * per_page
        assert PageBit.PRESENT | PageBit.UFFD_WP in entries.at(region.start)
        # A marker: nothing is on swap, but for small pages the bit is set.
        marker = entries.at(region.start + memory.page_size)
        swap = PageBit(0) if memory.is_hugetlb else PageBit.SWAP
        assert marker == PageBit.UFFD_WP | swap
        uffd.writeprotect(region, mode=WriteprotectMode(0))
        assert pagemap.read(region).count(PageBit.UFFD_WP) == 0


@needs_swap()
def test_swapped_pages_of_anonymous_memory() -> None:
    with Region.anonymous(4 * PAGE) as region, Pagemap() as pagemap:
        region.fill(1)
        swap_out(region, PAGE, 2 * PAGE)
        entries = pagemap.read(region)
        (run,) = entries.where(PageBit.SWAP, clear=PageBit.PRESENT)
        assert (run.start, run.end) == (region.start + PAGE, region.start + 3 * PAGE)


def test_read_takes_numbers_and_crosses_unmapped_memory() -> None:
    with Region.anonymous(2 * PAGE) as region, Pagemap() as pagemap:
        region.fill(1)
        whole = pagemap.read(region.start, region.length)
        assert list(whole) == list(pagemap.read(region))
        # Far more than one read(2) of the kernel's own buffer, most of it unmapped.
        low = region.start - region.start % (1 << 30)
        wide = pagemap.read(low, 1 << 30)
        assert wide.at(region.start) == whole.at(region.start)
        assert len(wide) == (1 << 30) // PAGE


def test_results_outlive_the_file() -> None:
    with Region.anonymous(2 * PAGE) as region:
        with Pagemap() as pagemap:
            entries = pagemap.read(region)
            view = entries.memoryview()
        del entries
        assert list(view) == [0, 0]
        with pytest.raises(TypeError):
            view[0] = 1


@pytest.mark.parametrize("start", [TASK_SIZE - PAGE, TASK_SIZE, 0xFFFF_FFFF_8000_0000])
def test_outside_the_address_space(start: int) -> None:
    with Pagemap() as pagemap:
        with pytest.raises(UffdOSError) as caught:
            pagemap.read(start, 2 * PAGE)
        assert caught.value.errno == errno.EFAULT
        assert caught.value.data["completed"] == max(0, TASK_SIZE - start)
        with pytest.raises(UffdOSError) as caught:
            pagemap.scan(start, 2 * PAGE)
        assert caught.value.errno == errno.EFAULT


def test_last_page_of_the_64_bit_space() -> None:
    with Pagemap() as pagemap:
        for use in (pagemap.read, pagemap.scan):
            with pytest.raises(UffdOSError) as caught:
                use((1 << 64) - PAGE, PAGE)
            assert caught.value.errno == errno.EFAULT


@needs_privilege("CAP_SYS_PTRACE")
def test_another_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        start = int(other.stdout.readline())
        with Pagemap(other.pid) as pagemap:
            assert pagemap.pid == other.pid
            (run,) = pagemap.read(start, 8 * PAGE).where(PageBit.PRESENT)
            assert (run.start, run.end) == (start, start + 2 * PAGE)
            other.stdin.close()
            assert other.wait() == 0
            with pytest.raises(ProcessGoneError) as caught:
                pagemap.read(start, 8 * PAGE)
            assert caught.value.errno == errno.ESRCH
            with pytest.raises(ProcessGoneError):
                pagemap.scan(start, 8 * PAGE)


@needs_privilege("CAP_SYS_PTRACE")
def test_another_process_that_executes_another_program() -> None:
    source = (
        OTHER.replace("read()", "readline()")
        + """
import os
os.execvp("cat", ["cat"])
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        start = int(other.stdout.readline())
        with Pagemap(other.pid) as pagemap:
            pagemap.read(start, PAGE)
            other.stdin.write(b"\n")
            # Only cat answers: it does not see what Python's readline has read ahead.
            while not select.select([other.stdout], [], [], 0.01)[0]:
                other.stdin.write(b"?\n")
            with pytest.raises(ProcessGoneError):
                pagemap.read(start, PAGE)
            with Pagemap(other.pid) as new:
                assert new.read(start, PAGE).count(PageBit.PRESENT) == 0


def in_a_forked_child() -> list[str]:
    with Pagemap() as own, Pagemap(os.getppid()) as parent:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            seen = []
            for pagemap in (own, parent):
                try:
                    pagemap.read(0, PAGE)
                    seen.append("read")
                except ClosedError:
                    seen.append("ClosedError")
            with Pagemap() as new:
                seen.append("read" if len(new.read(0, PAGE)) == 1 else "short")
            own.close()
            os.write(writer, " ".join(seen).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        own.read(0, PAGE)
        return os.read(reader, 100).decode().split()


def test_own_pagemap_means_nothing_in_a_forked_child() -> None:
    assert run_child(in_a_forked_child).value == ["ClosedError", "read", "read"]


def as_nobody() -> None:
    os.setgroups([])
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with pytest.raises(UffdPermissionError, match="as root, or with CAP_SYS_PTRACE") as caught:
        Pagemap(1)
    assert "belongs to another user (uid 0)" in caught.value.hint


@needs_privilege()
def test_somebody_elses_process() -> None:
    run_child(as_nobody)


def without_procfs(folder: str) -> None:
    root = os.open("/", os.O_RDONLY)
    os.chroot(folder)
    for pid in (None, os.getpid()):
        with pytest.raises(UffdOSError, match="procfs is not mounted") as caught:
            Pagemap(pid)
        assert type(caught.value) is UffdOSError
    os.fchdir(root)
    os.chroot(".")
    os.close(root)


@needs_privilege()
def test_names_procfs_where_it_lacks(tmp_path: Path) -> None:
    run_child(without_procfs, str(tmp_path))
