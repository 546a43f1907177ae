"""Working sets: the file and every way in which it can be bad, merging, and where to fill."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pyuffd import WorkingSet, WorkingSetRun, _working_set_files
from pyuffd._recording import LONGEST_S, SETTLED_S, Recording, Watched, check_until
from pyuffd._working_set import (
    HEAD,
    MOST_PAGES,
    MOST_RECORDINGS,
    MOST_ROWS,
    RARE,
    ROW,
    Place,
    Run,
    merged,
    pack,
    parts,
    unpack,
)
from pyuffd.handlers import FaultLog
from pyuffd.handlers._fault_log import _FAULT
from tests._memory import PAGE

ID = b"0123456789abcdef" * 2
PAGES = 1000
EMPTY = WorkingSet(ID, PAGES * PAGE)
RECORDED = [(7, 1), (3, 2), (500, 512 - 24)]


def rows(known: WorkingSet) -> list[tuple[int, ...]]:
    return list(ROW.iter_unpack(known.data))


def sealed(raw: bytes) -> bytes:
    """Return a file with the checksum that it should have."""
    head = raw[: HEAD.size - 4]
    digest = zlib.crc32(raw[HEAD.size :], zlib.crc32(head + bytes(4)))
    return head + digest.to_bytes(4, "little") + raw[HEAD.size :]


def file_of(*table: tuple[int, int, int, int], pages: int = PAGES, recordings: int = 3) -> bytes:
    """Return a file with any rows and a right checksum."""
    head = HEAD.pack(b"pyuffdWS", 1, ROW.size, ID, pages, len(table), recordings, 0)
    return sealed(head + b"".join(ROW.pack(*row) for row in table))


def test_what_was_recorded_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "startup.working-set"
    known = _working_set_files.add(str(path), ID, PAGES * PAGE, RECORDED)
    again = _working_set_files.load(str(path), ID, PAGES * PAGE)
    assert again == known
    assert again is not None
    assert list(again) == [
        WorkingSetRun(7 * PAGE, PAGE, 1, 1),
        WorkingSetRun(3 * PAGE, 2 * PAGE, 1, 1),
        WorkingSetRun(500 * PAGE, 488 * PAGE, 1, 1),
    ]
    assert again[-1] == again[2]
    assert again[:2] == list(again)[:2]
    with pytest.raises(IndexError):
        again[3]
    assert (again.length, again.recordings, again.problem) == (491 * PAGE, 1, "")
    assert path.stat().st_mode & 0o777 == 0o600
    # The header, and 16 bytes for each run.
    assert path.stat().st_size == 72 + 3 * 16
    assert os.listdir(tmp_path) == [path.name]
    assert _working_set_files.load(str(tmp_path / "other"), ID, PAGES * PAGE) is None


def test_a_file_that_is_cut_or_changed_anywhere_is_not_used() -> None:
    """At each length, and with each bit changed; longer ones too."""
    whole = pack(merged(EMPTY, RECORDED))
    assert not unpack(whole, ID, PAGES * PAGE).problem
    bad = [whole[:length] for length in range(len(whole))]
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        bad.append(bytes(changed))
    bad += [whole + b"\0", whole + bytes(ROW.size)]
    for raw in bad:
        known = unpack(raw, ID, PAGES * PAGE)
        assert known.problem, raw
        assert (len(known), known.length, known.recordings) == (0, 0, 0)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "other magic": (sealed(b"pyuffdws" + file_of((1, 1, 1, 1))[8:]), "not a working set"),
    "other version": (sealed(b"pyuffdWS\2" + file_of((1, 1, 1, 1))[9:]), "version 2"),
    "outside": (file_of((PAGES, 1, 1, 1)), "outside"),
    "over the end": (file_of((PAGES - 1, 2, 1, 1)), "outside"),
    "far outside": (file_of(((1 << 64) - 1, 1, 1, 1)), "outside"),
    "a huge run": (file_of((0, (1 << 32) - 1, 1, 1)), "outside"),
    "an empty run": (file_of((5, 0, 1, 1)), "outside"),
    "twice": (file_of((5, 1, 1, 1), (5, 1, 1, 1)), "twice"),
    "overlap": (file_of((9, 1, 1, 1), (5, 5, 1, 1)), "twice"),
    "never seen": (file_of((5, 1, 0, 1)), "seen"),
    "seen too often": (file_of((5, 1, 3, 2)), "seen"),
    "tried too often": (file_of((5, 1, 1, 4)), "seen"),
    "no recordings": (file_of(recordings=0), "recordings"),
    "too many recordings": (file_of(recordings=1 << 16), "recordings"),
    "another length": (file_of((1, 1, 1, 1), pages=PAGES + 1), "another image"),
    "rows that are not there": (
        sealed(HEAD.pack(b"pyuffdWS", 1, ROW.size, ID, PAGES, 1 << 60, 1, 0)),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_with_a_right_checksum_is_not_trusted(name: str) -> None:
    raw, why = HOSTILE[name]
    known = unpack(raw, ID, PAGES * PAGE)
    assert why in known.problem
    assert why in repr(known)
    assert list(known.often(0)) == []


def test_a_set_of_another_image_or_of_all_memory() -> None:
    raw = pack(merged(EMPTY, RECORDED))
    assert unpack(raw, ID[::-1], PAGES * PAGE).problem == "of another image"
    # Within its image, and yet no working set.
    pages = MOST_PAGES + 1
    assert (
        "no working set" in unpack(file_of((0, pages, 1, 1), pages=pages), ID, pages * PAGE).problem
    )
    assert "491 pages in 3 runs, recorded once" in repr(unpack(raw, ID, PAGES * PAGE))


NOT_FILES: dict[str, Callable[[Path, Path], object]] = {
    "FIFO": lambda path, _: os.mkfifo(path),
    "symlink": lambda path, good: path.symlink_to(good),
    "symlink to nothing": lambda path, _: path.symlink_to("nothing"),
    "folder": lambda path, _: path.mkdir(),
    "empty": lambda path, _: path.touch(),
    "huge": lambda path, _: path.write_bytes(bytes(HEAD.size + (MOST_ROWS + 1) * ROW.size)),
}


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_file_of_ours(name: str, tmp_path: Path) -> None:
    """It is not used, not waited for, and not followed; a new recording takes its place."""
    good, path = tmp_path / "good", tmp_path / "bad"
    before = pack(_working_set_files.add(str(good), ID, PAGES * PAGE, RECORDED))
    NOT_FILES[name](path, good)
    known = _working_set_files.load(str(path), ID, PAGES * PAGE)
    assert known is not None
    assert known.problem
    if name == "folder":
        with pytest.raises(IsADirectoryError):
            _working_set_files.add(str(path), ID, PAGES * PAGE, [(1, 1)])
        assert sorted(os.listdir(tmp_path)) == ["bad", "good"]
        return
    assert rows(_working_set_files.add(str(path), ID, PAGES * PAGE, [(1, 1)])) == [(1, 1, 1, 1)]
    assert not path.is_symlink()
    assert good.read_bytes() == before


LEFT: dict[str, Callable[[Path, Path], object]] = {
    "symlink": lambda path, victim: path.symlink_to(victim),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "FIFO": lambda path, _: os.mkfifo(path),
    "file": lambda path, _: path.write_bytes(b"of a process that was killed" * 100),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_in_the_way_of_a_recording(name: str, tmp_path: Path) -> None:
    """A temporary file of a process that was killed, or what somebody else put there."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    LEFT[name](tmp_path / ".hot.tmp", victim)
    known = _working_set_files.add(str(tmp_path / "hot"), ID, PAGES * PAGE, RECORDED)
    assert _working_set_files.load(str(tmp_path / "hot"), ID, PAGES * PAGE) == known
    assert victim.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["hot", "victim"]


def test_a_file_that_another_writes_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_working_set_files, "_LOCK_S", 0.1)
    with open(tmp_path / ".hot.tmp", "wb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="locked"):
            _working_set_files.add(str(tmp_path / "hot"), ID, PAGES * PAGE, RECORDED)
    _working_set_files.add(str(tmp_path / "hot"), ID, PAGES * PAGE, RECORDED)
    assert os.listdir(tmp_path) == ["hot"]


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hot"
    _working_set_files.add(str(path), ID, PAGES * PAGE, RECORDED)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        _working_set_files.add(str(path), ID, PAGES * PAGE, [(1, 1)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["hot"]


def test_recordings_that_end_at_once_are_all_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "hot")
    threads = [
        threading.Thread(
            target=_working_set_files.add, args=(path, ID, PAGES * PAGE, [(number, 2)])
        )
        for number in range(0, 20, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = _working_set_files.load(path, ID, PAGES * PAGE)
    assert known is not None
    assert (known.recordings, known.length) == (10, 20 * PAGE)


# Merging


def test_counts_of_several_recordings() -> None:
    first = merged(EMPTY, [(10, 4), (20, 1)])
    assert rows(first) == [(10, 4, 1, 1), (20, 1, 1, 1)]
    # 11 comes again; 30 is new, after 11; 20 does not come.
    second = merged(first, [(11, 1), (30, 2)])
    assert rows(second) == [
        (10, 1, 1, 2),
        (11, 1, 2, 2),
        (30, 2, 1, 2),
        (12, 2, 1, 2),
        (20, 1, 1, 2),
    ]
    assert second.recordings == 2
    # What was filled ahead could not be touched, unless it was touched before.
    third = merged(second, [(40, 1), (10, 1)], filled=[(10, 3)])
    assert rows(third) == [
        (40, 1, 1, 3),
        (10, 1, 2, 3),
        (11, 1, 2, 2),
        (30, 2, 1, 3),
        (12, 1, 1, 2),
        (13, 1, 1, 3),
        (20, 1, 1, 3),
    ]
    assert [run.offset // PAGE for run in third.often()] == [10, 11, 12]
    assert [run.offset // PAGE for run in third.often(1)] == [11]
    assert third.often(0) == list(third)
    with pytest.raises(ValueError, match="share"):
        third.often(1.5)


def test_what_is_seen_rarely_is_dropped() -> None:
    known = merged(EMPTY, [(1, 1), (2, 1)])
    for _ in range(RARE - 1):
        known = merged(known, [(1, 1)])
    assert rows(known)[1] == (2, 1, 1, RARE)
    known = merged(known, [(1, 1)])
    assert rows(known) == [(1, 1, RARE + 1, RARE + 1)]


def test_a_set_with_a_problem_is_begun_anew() -> None:
    bad = WorkingSet(ID, PAGES * PAGE, 9, b"", "truncated")
    assert rows(merged(bad, [(1, 1)])) == [(1, 1, 1, 1)]
    assert merged(bad, [(1, 1)]).recordings == 1


def test_counts_do_not_overflow() -> None:
    most = MOST_RECORDINGS
    known = unpack(file_of((1, 1, most, most), recordings=most), ID, PAGES * PAGE)
    assert not known.problem
    again = merged(known, [(1, 1)])
    assert rows(again) == [(1, 1, 1 << 15, 1 << 15)]
    assert again.recordings == 1 << 15
    assert not unpack(pack(again), ID, PAGES * PAGE).problem


def test_no_set_is_larger_than_a_file_may_be() -> None:
    image = WorkingSet(ID, (MOST_PAGES + 100) * PAGE)
    known = merged(image, [(0, MOST_PAGES - 1), (MOST_PAGES + 10, 5)])
    assert known.length == MOST_PAGES * PAGE
    assert not unpack(pack(known), ID, image.image_length).problem


class Model:
    """Each page by itself."""

    def __init__(self) -> None:
        self.counts: dict[int, list[int]] = {}
        self.order: list[int] = []
        self.recordings = 0

    def add(self, recorded: list[Run], filled: list[Run]) -> None:
        self.recordings += 1
        touched = list(dict.fromkeys(p for a, n in recorded for p in range(a, a + n)))
        untold = {p for a, n in filled for p in range(a, a + n)} - set(touched)
        for page, count in self.counts.items():
            if page not in untold:
                count[0] += page in touched
                count[1] += 1
        after: dict[int | None, list[int]] = {}
        last = None
        for page in touched:
            if page in self.counts:
                last = page
            else:
                after.setdefault(last, []).append(page)
        order = after.get(None, [])
        for page in self.order:
            order += [page, *after.get(page, [])]
        for page in touched:
            self.counts.setdefault(page, [1, self.recordings])
        self.order = [p for p in order if self.counts[p][0] * RARE >= self.counts[p][1]]
        self.counts = {p: self.counts[p] for p in self.order}


@pytest.mark.parametrize("seed", range(12))
def test_random_recordings_against_a_model(seed: int) -> None:
    """Counts and order of each page, through files, with overlapping runs of any length."""
    chance = random.Random(seed)
    known, model = EMPTY, Model()

    def some(most: int) -> list[Run]:
        found = []
        for _ in range(chance.randrange(most)):
            pages = chance.choice([1, 1, 1, 2, 7, 64])
            found.append((chance.randrange(PAGES - pages), pages))
        return found

    for _ in range(chance.randrange(1, 40)):
        recorded, filled = some(30), some(10)
        known = merged(known, recorded, filled)
        model.add(recorded, filled)
        known = unpack(pack(known), ID, PAGES * PAGE)
        assert not known.problem
    pages = {
        page + number: [seen, tried]
        for page, count, seen, tried in rows(known)
        for number in range(count)
    }
    assert pages == model.counts
    assert list(pages) == model.order


# Where to fill


def test_parts_of_the_memory_in_order() -> None:
    known = merged(EMPTY, [(90, 1), (10, 2), (98, 4), (13, 1)])
    places = [Place(0, 50 * PAGE, 0), Place(50 * PAGE, 50 * PAGE, 1, at=5 * PAGE)]

    def pages(gap: int = 0) -> list[tuple[int, int, int]]:
        return [(n, a // PAGE, b // PAGE) for n, a, b in parts(known, places, gap=gap)]

    # 98 to 101: the last two are in no memory.
    assert pages() == [(1, 45, 46), (0, 10, 12), (1, 53, 55), (0, 13, 14)]
    known = merged(EMPTY, [(10, 2), (13, 1), (12, 1), (49, 3)])
    assert pages() == [(0, 10, 12), (0, 13, 14), (0, 12, 13), (0, 49, 50), (1, 5, 7)]
    assert pages(gap=PAGE)[0] == (0, 10, 14)
    assert list(parts(known, [])) == []


def test_huge_pages_are_filled_once() -> None:
    """A set recorded on base pages, and memory that does not begin where a huge page does."""
    huge = 512 * PAGE
    known = merged(WorkingSet(ID, 4 * huge), [(700, 1), (5, 1), (701, 1), (600, 1), (1023, 2)])
    place = Place(0, 4 * huge, 0, 0, huge)
    assert [(a // huge, b // huge) for _, a, b in parts(known, [place])] == [(1, 2), (0, 1), (2, 3)]
    # 256 pages into a huge page: page 700 of the image is page 956 of the memory.
    place = Place(0, 3 * huge, 0, 256 * PAGE, huge)
    assert [(a // huge, b // huge) for _, a, b in parts(known, [place])] == [(1, 2), (0, 1), (2, 3)]


@pytest.mark.parametrize("seed", range(8))
def test_random_parts_cover_what_is_in_the_set(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([PAGE, 512 * PAGE])
    recorded = [
        (chance.randrange(PAGES - 64), chance.choice([1, 3, 64]))
        for _ in range(chance.randrange(80))
    ]
    known = merged(EMPTY, recorded)
    edge = chance.randrange(1, PAGES)
    # Two mappings that are one memory, and one that nobody has.
    places = [
        Place(0, edge * PAGE, 4, 0, size),
        Place(edge * PAGE, (PAGES - edge) * PAGE, 4, edge * PAGE, size),
    ]
    filled: set[int] = set()
    for number, begin, end in parts(known, places):
        assert number == 4
        assert begin % size == end % size == 0
        pages = set(range(begin // PAGE, end // PAGE))
        assert not pages & filled
        filled |= pages
    wanted = {page for begin, n in recorded for page in range(begin, begin + n)}
    per = size // PAGE
    assert filled == {
        u for page in wanted for u in range(page // per * per, page // per * per + per)
    }


# Recording


def log_of(*faults: tuple[int, int], lost: int = 0) -> FaultLog:
    """Return a log of (space, address)."""
    return FaultLog(b"".join(_FAULT.pack(at, 1, 0, 0, space) for space, at in faults), lost)


def test_faults_become_pages_of_the_image() -> None:
    base = 1 << 30
    huge = 512 * PAGE
    watched = [
        Watched(
            0,
            base,
            10 * PAGE,
            (Place(20 * PAGE, 4 * PAGE), Place(90 * PAGE, 2 * PAGE, 0, 6 * PAGE)),
        ),
        Watched(0, base + (1 << 28), 2 * huge, (Place(1000 * PAGE, 600 * PAGE, 1, 0, huge),)),
        Watched(3, base, 10 * PAGE, (Place(500 * PAGE, 10 * PAGE, 2),)),
    ]
    logs = [
        log_of((0, base + 3 * PAGE + 5), (0, base), (0, base + 3 * PAGE), (3, base), (1, base)),
        log_of((0, base + 4 * PAGE), (0, base + 7 * PAGE), (0, base + 10 * PAGE), (0, 5), lost=7),
        log_of((0, base + (1 << 28) + huge + 5), (0, base + (1 << 28) + 9)),
    ]
    recording = Recording(lambda: logs.pop(0), watched)
    for _ in range(3):
        recording.look()
    # Pages 4 and 5 of the first memory, and space 1, are of no image.
    assert recording.runs == [(23, 1), (20, 1), (500, 1), (91, 1), (1512, 88), (1000, 512)]
    assert len(recording) == 4 + 600
    assert recording.lost == 7


def test_a_recording_keeps_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyuffd._recording.MOST_ROWS", 3)
    faults = [(0, PAGE * number) for number in range(9)]
    recording = Recording(
        lambda: log_of(*faults), [Watched(0, 0, 9 * PAGE, (Place(0, 9 * PAGE),))], 1.0
    )
    recording.look()
    assert len(recording) == 3
    assert MOST_ROWS > 3


def test_when_a_recording_is_settled() -> None:
    """After a burst; not while pages keep coming, and not before the first."""
    came = 0
    recording = Recording(
        lambda: log_of(*((0, PAGE * number) for number in range(came))),
        [Watched(0, 0, 9999 * PAGE, (Place(0, 9999 * PAGE),))],
    )
    now, over = 0.0, None
    for step in range(200):
        came = 1000 if step > 40 else step * 25
        recording.look()
        if recording.is_over(now):
            over = now
            break
        now += 0.05
    assert over is not None
    assert 40 * 0.05 < over <= 41 * 0.05 + SETTLED_S + 0.1
    came = 0
    recording = Recording(lambda: log_of(), [])
    assert not any(recording.is_over(second / 2) for second in range(int(LONGEST_S) * 2))
    assert recording.is_over(LONGEST_S)
    timed = Recording(lambda: log_of(), [], 2.0)
    assert (timed.is_over(1.9), timed.is_over(2.0)) == (False, True)


@pytest.mark.parametrize(
    ("until", "error"),
    [("later", ValueError), (-1, ValueError), (None, TypeError), (float("nan"), ValueError)],
)
def test_a_bad_end(until: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_until(until)
