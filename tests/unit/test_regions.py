"""The parts of Region that need no kernel: names, state of the machine, /proc/self/maps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pyuffd import _machine, _vmas
from pyuffd.regions import _files, _maps

KIB = 1 << 10
HUGE = 2 << 20
GIANT = 1 << 30

MAPS = """\
1000-3000 rw-p 00000000 00:00 0
3000-5000 r--p 00000000 00:00 0
5000-6000 ---p 00000000 00:00 0
7000-9000 rw-s 00004000 00:01 2057                       /memfd:a-b (deleted)
9000-a000 rw-p 00000000 00:00 0                          [heap]
200000-400000 rw-p 00000000 00:11 7                      /anon_hugepage (deleted)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine with 2 MiB pages, 3 of 8 free, and no 1 GiB pages; returns its /proc/meminfo."""
    for size, pages in (
        (HUGE, {"nr_hugepages": 8, "free_hugepages": 5, "resv_hugepages": 2}),
        (GIANT, {"nr_hugepages": 0, "free_hugepages": 0, "resv_hugepages": 0}),
    ):
        pool = tmp_path / f"hugepages-{size // KIB}kB"
        pool.mkdir()
        for name, count in pages.items():
            (pool / name).write_text(f"{count}\n")
    meminfo = {"Hugepagesize": HUGE, "SwapTotal": 0, "SwapFree": 0, "MemTotal": 16 << 30}
    monkeypatch.setattr(_machine, "POOLS", str(tmp_path))
    monkeypatch.setattr(_machine, "_meminfo", meminfo.__getitem__)
    return meminfo


def test_sizes(machine: dict[str, int]) -> None:
    assert _machine.sizes() == [HUGE, GIANT]
    assert _machine.page_size_for(None) == 4096
    assert _machine.page_size_for(GIANT) == GIANT
    with pytest.raises(ValueError):
        _machine.page_size_for(4 << 20)


@pytest.mark.usefixtures("machine")
def test_a_reserve_below_zero() -> None:
    Path(_machine.POOLS, "hugepages-2048kB/resv_hugepages").write_text(f"{(1 << 64) - 1}\n")
    assert _machine.free_pages(HUGE) == 5


def test_a_machine_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "POOLS", f"{tmp_path}/none")
    assert _machine.sizes() == []
    assert _machine.free_pages(HUGE) == 0
    with pytest.raises(ValueError):
        _machine.page_size_for(HUGE)


def test_size_bits() -> None:
    assert _machine.size_bits(HUGE) == 21 << 26
    assert _machine.size_bits(GIANT) == 30 << 26


def test_shortage_names_the_command(machine: dict[str, int]) -> None:
    assert _machine.free_pages(HUGE) == 3
    text = _machine.shortage(HUGE, 5, -1)
    assert "3 of 8 huge pages of 2048 KiB are free, 5 are needed" in text
    assert "`sysctl vm.nr_hugepages=10`" in text
    giant = _machine.shortage(GIANT, 2, -1)
    assert f"`echo 2 > {_machine.POOLS}/hugepages-1048576kB/nr_hugepages`" in giant


def test_shortage_names_no_command_that_takes_more_than_all_memory(
    machine: dict[str, int],
) -> None:
    for size, count in ((HUGE, 1 << 19), (GIANT, 17)):
        text = _machine.shortage(size, count, -1)
        assert f"are needed: a pool of {'1024' if size == HUGE else '17'}.0 GiB" in text
        assert "this machine has 16.0 GiB of memory" in text
        assert "`" not in text


def test_swap_problem(machine: dict[str, int]) -> None:
    assert "no swap" in _machine.swap_problem()
    machine["SwapTotal"] = 64 << 20
    assert "all 64 MiB of swap are used" in _machine.swap_problem()
    machine["SwapFree"] = 4096
    assert _machine.swap_problem() == ""


def test_meminfo_is_in_bytes() -> None:
    assert _machine._meminfo("MemTotal") > 1 << 20
    assert _machine._meminfo("NoSuchLine") == 0


def fake_proc(folder: Path, *, mode: int, mappings: int, sizes: dict[str, int]) -> Path:
    """Write the files of a /proc that describe memory, in KiB."""
    (folder / "sys/vm").mkdir(parents=True)
    (folder / "sys/vm/overcommit_memory").write_text(f"{mode}\n")
    (folder / "sys/vm/max_map_count").write_text("100\n")
    (folder / "self").mkdir()
    (folder / "self/maps").write_text("00-01 line\n" * mappings)
    (folder / "self/status").write_text("Name:\tx\nVmSize:\t 1000 kB\nVmData:\t 500 kB\n")
    (folder / "meminfo").write_text("".join(f"{key}: {kib} kB\n" for key, kib in sizes.items()))
    return folder


MEMINFO = {"MemTotal": 1 << 20, "SwapTotal": 1 << 20, "CommitLimit": 1 << 21, "Committed_AS": 1}

# overcommit mode, mappings, length, accounted, what the hint names
LIMITS = [
    (0, 1, 3 << 30, True, "noreserve=True, or `sysctl vm.overcommit_memory=1`"),
    (0, 1, 3 << 30, False, "address space"),
    (0, 1, 1 << 30, True, "address space"),
    (0, 98, 4096, True, "vm.max_map_count is 100: join ranges, or `sysctl vm.max_map_count=200`"),
    (2, 1, 3 << 30, True, "`sysctl vm.overcommit_memory=0`"),
    (2, 1, 3 << 30, False, "address space"),
]


@pytest.mark.parametrize(("mode", "mappings", "length", "accounted", "named"), LIMITS)
def test_which_limit_a_mapping_met(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    mappings: int,
    length: int,
    accounted: bool,
    named: str,
) -> None:
    monkeypatch.setattr(
        _machine, "PROC", fake_proc(tmp_path, mode=mode, mappings=mappings, sizes=MEMINFO)
    )
    assert named in _machine.why_no_memory(length, accounted=accounted)


def test_a_limit_that_cannot_be_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_machine, "PROC", tmp_path)
    assert _machine.why_no_memory(4096, accounted=True) == ""


@pytest.mark.parametrize("name", ["a", "/a", "/a.b-c", "x" * 255, "/" + "x" * 255])
def test_shm_path(name: str) -> None:
    assert _files.shm_path(name) == "/dev/shm/" + name.lstrip("/")


@pytest.mark.parametrize("name", ["", "/", "//a", "a/", ".", "/..", "a\0", "é" * 128])
def test_shm_path_refuses(name: str) -> None:
    with pytest.raises(ValueError):
        _files.shm_path(name)


@pytest.fixture
def _maps_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmas, "open", lambda path, **_: io.StringIO(MAPS), raising=False)


@pytest.mark.usefixtures("_maps_file")
def test_maps_describe() -> None:
    assert _maps.describe(0x1000, 0x2000, ask_page_size=False) == _maps.Found(4096, False, True, 0)
    assert _maps.describe(0x2000, 0x2000, ask_page_size=False).writable is False
    shared = _maps.describe(0x8000, 0x1000, ask_page_size=False)
    assert shared == _maps.Found(4096, True, True, 0x5000)


@pytest.mark.usefixtures("_maps_file")
@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0x0, 0x1000),  # below everything
        (0x0, 0x2000),  # begins before a mapping
        (0x6000, 0x1000),  # in a gap
        (0x6000, 0x2000),  # begins in a gap
        (0x9000, 0x2000),  # ends in a gap
        (0x500000, 0x1000),  # above everything
        (0x4000, 0x2000),  # reaches PROT_NONE
        (0x8000, 0x2000),  # shared, then private
    ],
)
def test_maps_refuses(start: int, length: int) -> None:
    with pytest.raises(ValueError):
        _maps.describe(start, length, ask_page_size=False)
