"""Growing the pool of huge pages, with the kernel's arithmetic in place of its pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyuffd.testing import _huge_pages, _machine
from pyuffd.testing._huge_pages import Grown


class Pool:
    """Does to the counters what set_max_huge_pages() of mm/hugetlb.c does."""

    def __init__(
        self, total: int, *, used: int = 0, reserved: int = 0, surplus: int = 0, room: int = 1000
    ) -> None:
        self.total, self.free = total, total - used
        self.reserved, self.surplus, self.room = reserved, surplus, room
        self.writes: list[int] = []

    @property
    def state(self) -> tuple[int, int, int, int]:
        return self.total, self.free, self.reserved, self.surplus

    def count(self, name: str) -> int:
        names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
        return dict(zip(names, self.state, strict=True))[name]

    def resize(self, count: int) -> None:
        self.writes.append(count)
        while self.surplus and count > self.total - self.surplus:
            self.surplus -= 1
        while self.room and count > self.total - self.surplus:
            self._change(1)
        while self.total > max(count, self.reserved + self.total - self.free):
            self._change(-1)
        while count < self.total - self.surplus:
            self.surplus += 1

    def _change(self, pages: int) -> None:
        self.total += pages
        self.free += pages
        self.room -= pages


def fake(pool: Pool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    (folder / "nr_hugepages").touch()  # to lock
    monkeypatch.setattr(_huge_pages, "POOL", folder)
    monkeypatch.setattr(_huge_pages, "free_pages", lambda size: pool.free - pool.reserved)
    monkeypatch.setattr(_huge_pages, "_count", pool.count)
    monkeypatch.setattr(_huge_pages, "_resize", pool.resize)
    return pool


@pytest.mark.parametrize(
    ("pool", "grown", "written"),
    [
        (Pool(0), Grown(10, 0), [10]),
        (Pool(8), Grown(2, 0), [10]),
        (Pool(8, reserved=3), Grown(5, 0), [13]),
        (Pool(157, reserved=157, surplus=10), Grown(10, 10), [167]),
        (Pool(30, used=18, reserved=12, surplus=12), Grown(10, 12), [40]),
        (Pool(8, room=1), Grown(1, 0), [10]),
        (Pool(9, reserved=9, surplus=9, room=0), Grown(0, 9), [19]),
        (Pool(10), Grown(0, 0), []),
    ],
    ids=lambda value: str(value.state) if isinstance(value, Pool) else "",
)
def test_one_write_has_the_pages_at_hand_and_one_gives_them_back(
    pool: Pool,
    grown: Grown,
    written: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, room = fake(pool, tmp_path, monkeypatch).state, pool.room
    with pytest.raises(KeyError), _huge_pages.huge_pages(10):
        assert pool.writes == written
        assert _huge_pages.free_hugepages() == min(10, before[1] - before[2] + room)
        assert (pool.total, pool.surplus) == (before[0] + grown.added, before[3] - grown.counted_in)
        raise KeyError
    assert pool.state == before
    assert len(pool.writes) == 2 * len(written)


def test_adds_what_is_asked_for_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fake(Pool(30, reserved=20, surplus=12), tmp_path, monkeypatch)
    assert _huge_pages.add(64) == Grown(64, 12)
    assert _huge_pages.free_hugepages() == 10 + 64
    assert pool.writes == [94]


@pytest.mark.parametrize("pool", [Path("/nonexistent"), Path("/proc/1/task")], ids=str)
def test_no_pool_or_not_ours(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_huge_pages, "POOL", pool)
    assert _huge_pages.add(1) == Grown(0, 0)
    with _huge_pages.huge_pages(1):
        pass


def test_sessions_side_by_side_keep_their_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fake(Pool(157, reserved=157, surplus=10), tmp_path, monkeypatch)
    before = pool.state
    entries = []
    for pid in (1, 2):
        added, counted_in = _huge_pages.add(64)
        entries.append(_machine.Entry(pid, "", added, None, counted_in))
    assert [(entry.huge_pages, entry.counted_in) for entry in entries] == [(64, 10), (64, 0)]
    _machine._give_back(entries, 1)
    assert _huge_pages.free_hugepages() == 64
    _machine._give_back(entries, 2)
    assert (pool.state, entries) == (before, [])
