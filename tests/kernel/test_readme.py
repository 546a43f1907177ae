"""README.md tells what this kernel does; its programs and those of docs/ run."""

from __future__ import annotations

import contextlib
import errno

import pytest

from pyuffd import (
    Feature,
    Ioctl,
    PageBit,
    Pagemap,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    probe,
)
from pyuffd.testing import MEMORY_TYPES, needs
from tests import _readme
from tests._child import run_child
from tests._memory import Memory

TABLE = _readme.table("memory")
MODES = {
    "MISSING faults": RegisterMode.MISSING,
    "WP faults": RegisterMode.WP,
    "MINOR faults": RegisterMode.MINOR,
}
WITH_MODE = {
    "COPY": RegisterMode.MISSING,
    "ZEROPAGE": RegisterMode.MISSING,
    "MOVE": RegisterMode.MISSING,
    "POISON": RegisterMode.MISSING,
    "CONTINUE": RegisterMode.MINOR,
    "WRITEPROTECT": RegisterMode.WP,
}
ALL_OF_IT = (
    Feature.MISSING_SHMEM
    | Feature.MISSING_HUGETLBFS
    | Feature.MINOR_SHMEM
    | Feature.MINOR_HUGETLBFS
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.POISON
    | Feature.MOVE
)
# The kernel sets the bit for shmem too, but the ioctl fails with EINVAL.
BIT_WITHOUT_OPERATION = {("MOVE", "shmem"), ("MOVE", "shmem-private")}

PROGRAMS = [
    pytest.param(source, id=f"{page.name}-{number}")
    for page in _readme.PAGES
    for number, source in enumerate(_readme.programs(page))
]


def test_table_is_complete() -> None:
    assert list(TABLE) == [*MODES, *WITH_MODE]
    assert {tuple(cells) for cells in TABLE.values()} == {tuple(MEMORY_TYPES)}


@needs(ALL_OF_IT)
def test_table_against_the_ioctls_of_registered_ranges() -> None:
    found = probe().memory
    for row, cells in TABLE.items():
        for memory, cell in cells.items():
            if row in MODES:
                offered = bool(found[memory][MODES[row]].ioctls)
            else:
                offered = bool(found[memory][WITH_MODE[row]].ioctls & Ioctl[row])
            expected = cell == "yes" or (row, memory) in BIT_WITHOUT_OPERATION
            assert (row, memory, offered) == (row, memory, expected)


@needs(ALL_OF_IT)
@pytest.mark.parametrize("operation", WITH_MODE)
def test_table_against_the_operations(memory: Memory, operation: str) -> None:
    assert do(operation, memory) == TABLE[operation][memory.name]


def do(operation: str, memory: Memory) -> str:
    """Do one operation on a page; return the matching cell of the table."""
    features = ALL_OF_IT | Feature.PAGEFAULT_FLAG_WP
    size = memory.page_size
    target, source = memory.pages(1), memory.pages(1)
    source.fill(1)
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(Userfaultfd(features=features))
        if operation in ("CONTINUE", "WRITEPROTECT") and target.fd is not None:
            with Region.file(target.fd) as cache:
                cache.fill(1)
        if operation == "WRITEPROTECT":
            target.touch(0)
        try:
            uffd.register(target, mode=WITH_MODE[operation])
            match operation:
                case "COPY":
                    done = uffd.copy(target.start, source.start, size)
                case "ZEROPAGE":
                    done = uffd.zeropage(target)
                case "MOVE":
                    done = uffd.move(target.start, source.start, size)
                case "POISON":
                    done = uffd.poison(target)
                case "CONTINUE":
                    done = uffd.continue_(target)
                case _:
                    uffd.writeprotect(target)
                    with Pagemap() as pagemap:
                        done = size * (PageBit.UFFD_WP in pagemap.read(target).at(target.start))
        except UffdOSError as error:
            if error.errno != errno.EINVAL:
                raise
            return "no"
    assert done == size
    return "yes"


def test_there_is_a_program() -> None:
    assert len(_readme.programs(_readme.README)) >= 1


@pytest.mark.parametrize("source", PROGRAMS)
def test_program(source: str) -> None:
    assert run_child(source).stdout
