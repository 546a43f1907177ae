"""Restores that record a working set and fill it first; no set changes a byte."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, Handler, Region, Restore, Snapshot, Userfaultfd, WorkingSet
from pyuffd._residency import PageResidency
from pyuffd._working_set import ROW, merged
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._serve import AROUND
from pyuffd.testing import needs
from tests._child import run_child
from tests._images import START, data, write, zero
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._serving import wait_until

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
HUGE = 2 << 20
WAIT_S = 60.0
PAGES = 1500


@contextlib.contextmanager
def image(pages: int = PAGES) -> Iterator[Snapshot]:
    """A snapshot with another mapping before the one that is restored."""
    with tempfile.TemporaryDirectory(prefix="restore-") as path:
        parts = [data(pages // 2, 1), zero(3), data(pages - pages // 2 - 3, 2)]
        write(Path(path) / "one", [(START - HUGE, [data(7)]), (START, parts)])
        with Snapshot.open(Path(path) / "one") as snapshot:
            yield snapshot


def pages_of(known: WorkingSet | None) -> list[int]:
    """Return the pages of a set, counted from the second mapping."""
    assert known is not None
    return [(run.offset + at) // PAGE - 7 for run in known for at in range(0, run.length, PAGE)]


def recorded_and_filled_first(mode: Any) -> None:
    """The faults of a program that does the same again are gone, and it can add others."""
    touched = random.Random(1).sample(range(PAGES), 200)
    others = [page for page in range(0, PAGES, 50) if page not in touched]
    with image() as snapshot:
        good = snapshot.read(START, PAGES * PAGE)

        def restore(pages: list[int], **options: Any) -> tuple[int, int]:
            with (
                Region.anonymous(PAGES * PAGE) as region,
                snapshot.restore(
                    {START: region}, mode=mode, record="hot", record_until=600, **options
                ) as restore,
            ):
                assert restore.wait_hot(WAIT_S)
                for page in pages:
                    assert region.read(page * PAGE, 8) == good[page * PAGE : page * PAGE + 8]
                faults = restore.stats.faults
                restore.stop_recording()
                assert restore.record_error is None
                assert restore.wait(WAIT_S)
                assert region.read() == good
                if restore.recorded is not None:
                    assert restore.recorded == snapshot.working_set("hot")
                return faults, restore.stats.hot_bytes

        assert restore(touched) == (200, 0)
        assert pages_of(snapshot.working_set("hot")) == touched
        if mode == "minor":  # its memfd has everything by now
            return
        # Zeros of the image are filled too: a fault would cost more.
        assert restore(touched, working_set="hot") == (0, 200 * PAGE)
        known = snapshot.working_set("hot")
        assert known is not None
        assert known.recordings == 1  # nothing was touched that was not there
        assert restore(touched + others, working_set=known) == (len(others), 200 * PAGE)
        known = snapshot.working_set("hot")
        assert known is not None
        assert sorted(pages_of(known)) == sorted(touched + others)
        counts = {page: run[2:] for run in known for page in [run.offset // PAGE - 7]}
        assert counts[touched[0]] == (1, 1)  # the second recording could not tell
        assert counts[others[0]] == (1, 2)


@pytest.mark.parametrize("mode", ["copy", "auto", "minor"])
def test_recorded_and_filled_first(mode: str) -> None:
    run_child(recorded_and_filled_first, mode, budget_s=60)


def on_any_memory(name: str) -> None:
    """A set that was recorded on base pages is filled in huge ones, and the other way round."""
    pages = 3 * HUGE // PAGE
    with image(pages) as snapshot, contextlib.closing(memory_of(name)) as memory:
        good = snapshot.read(START, pages * PAGE)
        base = 7 * PAGE
        known = merged(
            WorkingSet(_working_sets.image_id(snapshot._image), base + pages * PAGE),
            [(7 + 512 + 9, 1), (7 + 5, 1), (7 + 512 + 10, 2), (0, 3)],
        )
        region = memory.pages(3 * HUGE // memory.page_size)
        with snapshot.restore(
            {START: region}, working_set=known, record="hot", record_until=600
        ) as restore:
            assert restore.wait_hot(WAIT_S)
            size = memory.page_size
            wanted = 2 * HUGE if size == HUGE else 4 * PAGE
            assert restore.stats.hot_bytes == wanted
            for page in (512 + 9, 5, 512 + 11):
                assert region.read(page * PAGE, 8) == good[page * PAGE : page * PAGE + 8]
            assert restore.stats.faults == 0
            region.read(2 * HUGE + PAGE, 8)
            restore.stop_recording()
            assert restore.recorded is not None
            (run,) = restore.recorded
            # A huge page that was touched is all that it holds.
            at = base + (2 * HUGE + PAGE) // size * size
            assert (run.offset, run.length) == (at, size)
            assert restore.wait(WAIT_S)
            assert region.read() == good


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
def test_on_any_memory(name: str) -> None:
    run_child(on_any_memory, name, budget_s=60)


BAD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-1],
    "flipped": lambda raw: raw[:80] + bytes([raw[80] ^ 1]) + raw[81:],
    "of another image": lambda raw: raw[:16] + b"0" * 32 + raw[48:],
    "beyond the image": lambda raw: raw[: -ROW.size] + ROW.pack(1 << 60, 9, 1, 1),
}


def filled_first(restore: Restore) -> Iterator[tuple[int, int]]:
    """Yield (number of a region, offset in it) of each range, in the order of filling."""
    for plan, first, past, memory in restore._hot._windows:
        for begin in plan.rows(first, past).cast("B").cast("Q").tolist()[::3]:
            yield memory, begin


def several_regions() -> None:
    """Two parts of the image in one order; and one part of it in two regions."""
    with image() as snapshot:
        good = snapshot.read(START, PAGES * PAGE)
        pages = (900, 310, 950, 7)
        _working_sets.add(snapshot._image, "hot", [(7 + page, 1) for page in pages])
        # What is filled at once is put together by region.
        both, twice = [(1, 100), (1, 150), (0, 310), (0, 7)], [(0, 310), (0, 7), (1, 10)]
        for second, order in ((800, both), (300, twice)):
            with (
                Region.anonymous(500 * PAGE) as one,
                Region.anonymous(300 * PAGE) as two,
                snapshot.restore(
                    [(START, one), (START + second * PAGE, two)], mode="copy", working_set="hot"
                ) as restore,
            ):
                assert restore.wait_hot(WAIT_S)
                assert [(n, at // PAGE) for n, at in filled_first(restore)] == order
                assert restore.wait(WAIT_S)
                assert one.read() == good[: 500 * PAGE]
                assert two.read() == good[second * PAGE : (second + 300) * PAGE]


def test_several_regions() -> None:
    run_child(several_regions, budget_s=60)


def no_set_changes_a_byte() -> None:
    """Damaged, foreign, hostile but well-formed, or not there: all bytes are right."""
    with image() as snapshot:
        good = snapshot.read(START, PAGES * PAGE)
        whole = _working_sets.add(snapshot._image, "good", [(9, 2), (1, 1)])
        raw = Path(snapshot.path, "good.working-set").read_bytes()
        total = _working_sets.image_length(snapshot._image) // PAGE
        # In any order, everything, memory that is not restored, pages of zeros.
        hostile = [(page, 1) for page in range(total - 1, -1, -3)] + [(0, total)]
        _working_sets.add(snapshot._image, "hostile", hostile)
        for name, change in BAD.items():
            Path(snapshot.path, f"{name.replace(' ', '-')}.working-set").write_bytes(change(raw))
        foreign = merged(WorkingSet(b"x" * 32, whole.image_length), [(5, 1)])
        names = [name.replace(" ", "-") for name in BAD]
        tried: list[str | WorkingSet] = [*names, "hostile", "not-there", foreign]
        for given in tried:
            with (
                Region.anonymous(PAGES * PAGE) as region,
                snapshot.restore({START: region}, mode="copy", working_set=given) as restore,
            ):
                assert restore.working_set is not None
                assert bool(restore.working_set.problem) == (given != "hostile"), given
                assert restore.wait_hot(WAIT_S)
                assert restore.wait(WAIT_S)
                assert (restore.stats.hot_bytes > 0) == (given == "hostile")
                assert region.read() == good


def test_no_set_changes_a_byte() -> None:
    run_child(no_set_changes_a_byte, budget_s=60)


def reads_little(kind: str) -> None:
    """A fault of a cold file reads little around its page, and only that beside a working set."""
    with image() as snapshot:
        good = snapshot.read(START, PAGES * PAGE)
        fd = snapshot._image.pages_fileno()
        known = None
        if kind == "set":
            length = _working_sets.image_length(snapshot._image)
            known = merged(WorkingSet(_working_sets.image_id(snapshot._image), length), [(9, 1)])
        with (
            Region.anonymous(PAGES * PAGE) as region,
            Region.file(fd, os.fstat(fd).st_size // PAGE * PAGE, writable=False) as file,
            snapshot.restore(
                {START: region}, mode="copy", working_set=known, paused=True
            ) as restore,
        ):

            def cached() -> int:
                return sum(state is not PageResidency.SWAPPED for state in file.residency())

            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached():
                return  # a tmpfs has no colder place
            page = 400
            assert region.read(page * PAGE, 8) == good[page * PAGE : page * PAGE + 8]
            assert 1 <= cached() <= (1 if kind == "set" else AROUND // PAGE)
            restore.resume()
            assert restore.wait(WAIT_S)
            assert region.read() == good


@pytest.mark.parametrize("kind", ["none", "set"])
def test_a_fault_reads_little_of_a_cold_file(kind: str) -> None:
    run_child(reads_little, kind, budget_s=60)


def ends() -> None:
    """Closed while it records, with what was touched saved; a folder that cannot be written."""
    with image() as snapshot:
        good = snapshot.read(START, PAGES * PAGE)
        with Region.anonymous(PAGES * PAGE) as region:
            with snapshot.restore({START: region}, record="hot", record_until=600) as restore:
                assert (restore.method, "recorded" in restore.why) == ("copy", True)
                region.read(3 * PAGE, 1)
                assert not restore.wait(0.1)
                assert restore.stats.loaded_bytes == 0
            assert pages_of(restore.recorded) == [3]
        # By itself, when it is settled.
        with (
            Region.anonymous(PAGES * PAGE) as region,
            Userfaultfd() as uffd,
            Handler(uffd, fault_log=100) as handler,
            snapshot.restore({START: region}, handler=handler, record="hot", threads=3) as restore,
        ):
            region.read(4 * PAGE, 1)
            assert restore.wait(WAIT_S)
            assert region.read() == good
            assert sorted(pages_of(restore.recorded)) == [3, 4]
        folder = Path(snapshot.path)
        os.mkdir(folder / "no.working-set")
        with (
            Region.anonymous(PAGES * PAGE) as region,
            snapshot.restore({START: region}, record="no", record_until=600) as restore,
        ):
            region.read(4 * PAGE, 1)
            restore.stop_recording()
            assert isinstance(restore.record_error, IsADirectoryError)
            assert restore.wait(WAIT_S)
            assert region.read() == good
        wait_until(lambda: threading.active_count() == 1, "the end of the last thread")


def test_ends() -> None:
    run_child(ends, budget_s=60)


def bad_arguments() -> None:
    with (
        image() as snapshot,
        Region.anonymous(PAGES * PAGE) as region,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
    ):
        bad: list[dict[str, Any]] = [
            {"working_set": "a/b"},
            {"record": ""},
            {"record": "hot", "mode": "map"},
            {"record": "hot", "record_until": "later"},
            {"record": "hot", "handler": handler},
        ]
        for options in bad:
            with pytest.raises(ValueError):
                snapshot.restore({START: region}, **options)
        with pytest.raises(TypeError):
            snapshot.restore({START: region}, working_set=5)  # type: ignore[arg-type]
        assert os.listdir(snapshot.path).count("hot.working-set") == 0


def test_bad_arguments() -> None:
    run_child(bad_arguments)
