"""The pages of a Region: advice, page-out, hole punching, and the residency() afterwards."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest

from pyuffd import Region, UffdOSError
from pyuffd.testing import needs_swap
from tests._memory import Memory

PAGE = 4096
HUGE = 2 << 20


def names(region: Region) -> list[str]:
    return [state.name for state in region.residency()]


def test_punch_hole(memory: Memory) -> None:
    region = memory.pages(3)
    region.fill(7)
    page = memory.page_size
    region.punch_hole(page, page)
    assert region.read() == b"\7" * page + bytes(page) + b"\7" * page
    region.punch_hole()
    assert region.read() == bytes(3 * page)


def test_punch_hole_reaches_aliases(memory: Memory) -> None:
    if not memory.shared:
        return
    region = memory.pages(2)
    with region.alias() as alias:
        region.fill(1)
        alias.punch_hole(0, memory.page_size)
        assert region.read(0, 1) == b"\0"
        assert region.read(memory.page_size, 1) == b"\1"


def test_punch_hole_gives_the_memory_back(memory: Memory) -> None:
    region = memory.pages(4)
    region.fill(1)
    assert set(names(region)) <= {"MAPPED", "PRIVATE"}
    region.punch_hole(0, 2 * memory.page_size)
    after = names(region)
    assert set(after[2:]) <= {"MAPPED", "PRIVATE"}
    # The file's own page, which Linux made before copying it, stays in the page cache.
    left = "RESIDENT" if memory.name == "shmem-private" else "HOLE"
    assert after[:2] == [left, left]


def test_pages_must_be_whole(memory: Memory) -> None:
    region = memory.pages(2)
    for offset, length in ((1, memory.page_size), (0, 1), (memory.page_size // 2, None)):
        for call in (
            lambda o=offset, n=length: region.punch_hole(o, n),
            lambda o=offset, n=length: region.residency(o, n),
            lambda o=offset, n=length: region.madvise(mmap.MADV_DONTNEED, o, n),
        ):
            with pytest.raises(ValueError):
                call()


def test_residency_of_a_part(memory: Memory) -> None:
    region = memory.pages(3)
    region.touch(memory.page_size, memory.page_size, write=True)
    states = region.residency(memory.page_size, 2 * memory.page_size)
    assert len(states) == 2
    assert states.start == region.start + memory.page_size
    assert states.page_size == memory.page_size
    assert states[0].name in {"MAPPED", "PRIVATE"}
    assert states[1].name not in {"MAPPED", "PRIVATE"}


def test_madvise_carries_the_errno() -> None:
    with Region.anonymous(PAGE) as region, pytest.raises(UffdOSError) as caught:
        region.madvise(12345)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.length == PAGE


def test_thp_advice_is_in_the_flags_of_the_mapping() -> None:
    with Region.anonymous(HUGE) as region:
        region.advise_thp()
        assert "hg" in flags(region)
        region.advise_thp(False)
        assert "nh" in flags(region)


def test_thp_advice_is_not_for_hugetlb(memory: Memory) -> None:
    region = memory.pages(1)
    if memory.is_hugetlb:
        with pytest.raises(ValueError):
            region.advise_thp()
    else:
        region.advise_thp()


@needs_swap()
def test_pageout(memory: Memory) -> None:
    region = memory.pages(8)
    region.fill(9)
    if memory.is_hugetlb:
        with pytest.raises(ValueError):
            region.pageout()
        return
    region.pageout(0, 4 * PAGE)
    after = names(region)
    # A page of the page cache stays RESIDENT until its copy is written.
    assert set(after[:4]) <= ({"SWAPPED", "RESIDENT"} if memory.shared else {"SWAPPED"})
    assert set(after[4:]) <= {"MAPPED", "PRIVATE"}
    assert region.read() == b"\x09" * region.length


def test_pageout_without_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would return success and keep the pages; a file on disk needs no swap."""
    monkeypatch.setattr("pyuffd._machine.swap_problem", lambda: "no swap")
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    needing = [Region.anonymous(PAGE), Region.memfd(PAGE), Region.file(path, shared=False)]
    if is_in_memory(path):
        needing.append(Region.file(path))
    else:
        with Region.file(path) as on_disk:
            on_disk.touch()
            on_disk.pageout()
            assert on_disk.read(0, 1) == b"x"
    for region in needing:
        with region, pytest.raises(UffdOSError) as caught:
            region.pageout()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.hint == "no swap"


def is_in_memory(path: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    device = path.stat().st_dev
    return any(
        line.split()[2] == f"{device >> 8}:{device & 0xFF}" and " - tmpfs " in line
        for line in mounts
    )


def flags(region: Region) -> list[str]:
    return smaps_line(region, "VmFlags:")[1:]


def smaps_line(region: Region, name: str) -> list[str]:
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(end, 16) for end in words[0].split("-"))
            found = first <= region.start < last
        elif found and words[0] == name:
            return words
    raise AssertionError(f"no {name} for {region!r}")
