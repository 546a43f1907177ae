"""Reading what a process has on swap leaves it as easy to swap out as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pyuffd import Process, write_core
from pyuffd.pagemap import PageRanges
from pyuffd.testing import needs_privilege, needs_swap
from pyuffd.testing._run import SCALE

pytestmark = [
    needs_swap(),
    needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN"),
    needs_privilege("CAP_SYS_NICE"),
]
LENGTH = 4 << 20
TARGET = f"""
import sys
from pyuffd import Region
from pyuffd.testing import swap_out
with Region.anonymous({LENGTH}) as region:
    region.fill(7)
    for line in sys.stdin:
        swap_out(region)
        print(region.start, flush=True)
"""


class Swapped(NamedTuple):
    """A process with memory on swap."""

    pid: int
    start: int


@pytest.fixture(scope="module")
def program() -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", TARGET]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        yield target
        target.kill()


@pytest.fixture
def swapped(program: subprocess.Popen[str]) -> Swapped:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("swap\n")
    program.stdin.flush()
    return Swapped(program.pid, int(program.stdout.readline()))


def in_use(target: Swapped) -> tuple[int, int]:
    """Return how much of the memory is mapped, and how much looks as if it was in use."""
    sizes: dict[str, int] = {}
    is_it = False
    for line in Path(f"/proc/{target.pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        start, _, end = word.partition("-")
        if end:
            is_it = int(start, 16) <= target.start < int(end, 16)
        elif is_it and rest.endswith(" kB"):
            sizes[word] = int(rest.split()[0]) << 10
    return sizes["Rss:"], sizes["Referenced:"]


def pages(target: Swapped) -> PageRanges:
    return PageRanges.of([(target.start, target.start + LENGTH)])


def check(target: Swapped) -> None:
    mapped, used = in_use(target)
    assert mapped == LENGTH, "it was read"
    assert used <= LENGTH // 16


@pytest.mark.parametrize("method", ["stopped", "precopy", "cow"])
def test_of_a_core(method: str, swapped: Swapped, tmp_path: Path) -> None:
    """At the limit of its memory cgroup, a process with pages in use is killed."""
    with Process(swapped.pid) as process:
        write_core(process, tmp_path / "core", method=method, max_stall_s=10 * SCALE)
    check(swapped)


def test_of_a_copy(swapped: Swapped) -> None:
    with Process(swapped.pid) as process:
        content = bytearray(LENGTH)
        process.copy(pages(swapped), content)
    assert content == b"\7" * LENGTH
    check(swapped)


def test_of_a_copy_to_a_file(swapped: Swapped, tmp_path: Path) -> None:
    with Process(swapped.pid) as process, open(tmp_path / "copy", "wb") as file:
        process.copy(pages(swapped), file)
    assert os.stat(tmp_path / "copy").st_size == LENGTH
    check(swapped)
