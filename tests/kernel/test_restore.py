"""`Snapshot.restore`: every byte, by every method, on every memory; damage; ends in the middle."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    RangeBusyError,
    Region,
    RunState,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    UffdOSError,
    Userfaultfd,
    lazy,
)
from pyuffd.snapshot import _content, _restore_map
from pyuffd.testing import needs
from tests import _images
from tests._child import run_child
from tests._images import START, Part, data, write, zero
from tests._memory import PAGE, memory_of, memory_params

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
HUGE = 2 << 20
PIECE = _content.PIECE


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder of a file system whose files have a page cache."""
    with tempfile.TemporaryDirectory(prefix="restore-") as path:
        yield Path(path)


def mixed(pages: int, seed: int) -> list[Part]:
    """Return runs of data and zeros with odd lengths, with this many pages in total."""
    rng = random.Random(seed)
    parts: list[Part] = []
    while pages:
        size = min(pages, rng.choice((1, 1, 2, 3, 5, 17, 300)))
        parts.append(
            data(size, rng.randrange(1 << 20))
            if rng.random() < 0.7
            else Part(size, rng.choice((RunState.ZERO, RunState.ABSENT)))
        )
        pages -= size
    return parts


def chain(path: Path, pages: int, depth: int, **options: Any) -> Path:
    """Write a chain of snapshots; each has a third of its pages from its parents."""
    newest = write(path / "0", [(START, mixed(pages, 1))], **options)
    for number in range(1, depth + 1):
        rng = random.Random(100 + number)
        parts: list[Part] = []
        left = pages
        while left:
            size = min(left, rng.choice((1, 2, 7, 90)))
            kind = rng.choice((RunState.PARENT, RunState.DATA, RunState.DATA, RunState.ZERO))
            parts.append(
                data(size, rng.randrange(1 << 20)) if kind is RunState.DATA else Part(size, kind)
            )
            left -= size
        newest = write(path / str(number), [(START, parts)], parent=newest, **options)
    return newest


def expected(snapshot: Snapshot) -> bytes:
    region = snapshot.regions[0]
    return snapshot.read(region.start, region.length)


# Every byte

METHODS = [
    *[("copy", memory) for memory in ("anon", "shmem", "shmem-private")],
    ("copy", "hugetlb"),
    ("copy", "hugetlb-private"),
    ("minor", "anon"),
    ("map", "anon"),
    ("auto", "anon"),
    ("auto", "shmem"),
]


def every_byte(mode: Any, name: str) -> None:
    memory = memory_of(name)
    with contextlib.closing(memory), folder() as path:
        pages = 2 * HUGE // PAGE
        chain(path, pages, 3)
        shutil.copytree(path / "3", path / "copied 3")  # not sparse by then, or not so
        for number in (0, 1, 3):
            with Snapshot.open(path / str(number)) as snapshot:
                want = expected(snapshot)
                region = memory.make(2 * HUGE)
                with snapshot.restore([(START, region)], mode=mode, paused=True) as restore:
                    # Demand faults alone, in a part of it.
                    for page in random.Random(number).sample(range(pages), 40):
                        at = page * PAGE
                        assert region.read(at, PAGE) == want[at : at + PAGE], page
                    assert restore.done == (restore.method == "map")
                    restore.resume()
                    assert restore.wait(30)
                    assert restore.done
                    assert region.read() == want
                    progress = restore.progress
                    assert progress.bytes == progress.total
                    assert restore.method == (
                        "map"
                        if (mode, name) == ("auto", "anon")
                        else "copy"
                        if mode == "auto"
                        else mode
                    )
                    assert restore.why
                    assert not registered(region)
                    region.write(5 * PAGE, b"written")
                with Snapshot.open(path / str(number)) as again:
                    again.verify()  # what is written never reaches the files


def registered(region: Region) -> bool:
    """Whether some of it is registered with a userfaultfd."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(each, 16) for each in head.split("-"))
            inside = start < region.start + region.length and region.start < end
        elif inside and head == "VmFlags:":
            flags = line.split()
            if {"um", "uw", "ui"} & set(flags):
                return True
    return False


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param(mode, *param.values, id=f"{mode}-{name}", marks=param.marks)  # type: ignore[attr-defined]
        for mode, name in METHODS
        for param in memory_params(name)
    ],
)
def test_every_byte_of_a_chain(mode: str, name: str) -> None:
    run_child(every_byte, mode, name, budget_s=30)


def compressed() -> None:
    with folder() as path:
        newest = chain(path, 600, 1, compress=True)
        for mode in ("copy",):
            with Snapshot.open(newest) as snapshot, Region.anonymous(600 * PAGE) as region:
                want = expected(snapshot)
                with pytest.raises(ValueError, match="compressed"):
                    snapshot.restore({START: region}, mode="map")
                with snapshot.restore({START: region}, mode=mode) as restore:
                    assert region.read(17 * PAGE, PAGE) == want[17 * PAGE : 18 * PAGE]
                    assert restore.wait(30)
                    assert region.read() == want


def test_a_compressed_chain() -> None:
    pytest.importorskip("zstandard")
    run_child(compressed, budget_s=40)


def compressed_behind_zeros() -> None:
    """The region that is served first, that with the lower address, needs no Python."""
    with folder() as path:
        starts = (START, START + HUGE)
        newest = write(path / "0", [(starts[0], [zero(3)]), (starts[1], [data(3)])], compress=True)
        with (
            Snapshot.open(newest) as snapshot,
            Region.anonymous(3 * PAGE) as one,
            Region.anonymous(3 * PAGE) as other,
        ):
            pairs = list(zip(starts, sorted((one, other), key=lambda r: r.start), strict=True))
            with snapshot.restore(pairs, mode="copy", threads=1) as restore:
                assert restore.wait(30)
            for start, region in pairs:
                assert region.read() == snapshot.read(start, 3 * PAGE)


def test_compressed_regions_behind_zeros() -> None:
    pytest.importorskip("zstandard")
    run_child(compressed_behind_zeros, budget_s=40)


def damaged_and_compressed() -> None:
    """The background tells of the file, as it does without compression, and fills the rest."""
    with folder() as path:
        newest = write(path / "0", [(START, [data(3 * PIECE // PAGE)])], compress=True)
        with Snapshot.open(newest) as snapshot, Region.anonymous(3 * PIECE) as region:
            want, run = expected(snapshot), list(snapshot.runs)[1]
            with open(newest / "pages", "r+b") as pages:
                pages.seek(run.offset + run.stored // 2)
                pages.write(b"damaged")
            with snapshot.restore({START: region}, mode="copy") as restore:
                with pytest.raises(SnapshotFormatError) as caught:
                    restore.wait(30)
                assert caught.value.path == str(newest / "pages")
                assert caught.value.offset == run.offset
                assert region.read(0, PIECE) == want[:PIECE]
                assert region.read(2 * PIECE, PIECE) == want[2 * PIECE :]
                with pytest.raises(PagePoisonedError):
                    region.read(PIECE, PAGE)


def test_a_damaged_compressed_chunk() -> None:
    pytest.importorskip("zstandard")
    run_child(damaged_and_compressed, budget_s=40)


def ten_thousand_runs() -> None:
    pages = 20_000
    with folder() as path:
        parts = [data(1, page) if page % 2 else zero(1) for page in range(pages)]  # 10,000 of each
        write(path / "one", [(START, parts)])
        with Snapshot.open(path / "one") as snapshot:
            want = expected(snapshot)
            for mode in ("copy", "minor"):
                with Region.anonymous(pages * PAGE) as region:
                    with snapshot.restore({START: region}, mode=mode) as restore:
                        assert region.read(9999 * PAGE, PAGE) == want[9999 * PAGE :][:PAGE]
                        assert restore.wait(30)
                    assert region.read() == want, mode


def test_ten_thousand_ranges() -> None:
    run_child(ten_thousand_runs, budget_s=40)


def many_regions() -> None:
    """Parts of one snapshot in any order, each in a region of its own."""
    count = 300
    with folder() as path, contextlib.ExitStack() as stack:
        write(path / "one", [(START + 64 * n * PAGE, [data(3, n), zero(1)]) for n in range(count)])
        snapshot = stack.enter_context(Snapshot.open(path / "one"))
        regions = {
            where: stack.enter_context(Region.anonymous(where.length))
            for where in reversed(snapshot.regions)
        }
        # No descriptor for each region: a process may have 1,024 by default.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (count // 2, hard))
        with snapshot.restore(regions, mode="copy") as restore:
            assert restore.wait(30)
            for where, region in regions.items():
                assert region.read() == snapshot.read(where.start, where.length)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_regions() -> None:
    run_child(many_regions, budget_s=30)


# What is missing

GAPS = [
    (RunState.LOST, 0),
    (RunState.SHARED, 0),
    (RunState.ABSENT, 7),
]


def gaps(mode: Any) -> None:
    for state, inode in GAPS:
        with folder() as path:
            write(path / "one", [(START, [data(4), Part(3, state), data(2, 1)])], inode=inode)
            with Snapshot.open(path / "one") as snapshot:
                with (
                    Region.anonymous(9 * PAGE) as region,
                    pytest.raises(SnapshotError, match=state.value) as caught,
                ):
                    snapshot.restore({START: region}, mode=mode)
                assert caught.value.reason == "gaps"
                # Parts without a gap can be restored.
                with (
                    Region.anonymous(4 * PAGE) as region,
                    snapshot.restore({START: region}, mode=mode) as restore,
                ):
                    restore.wait()
                    assert region.read() == snapshot.read(START, 4 * PAGE)
                with (
                    Region.anonymous(9 * PAGE) as region,
                    snapshot.restore({START: region}, mode=mode, gaps="zeros") as restore,
                ):
                    restore.wait()
                    assert region.read(4 * PAGE, 3 * PAGE) == bytes(3 * PAGE)
                with Region.anonymous(9 * PAGE) as region:
                    if mode != "copy":
                        with pytest.raises(ValueError, match="poison"):
                            snapshot.restore({START: region}, mode=mode, gaps="poison")
                        continue
                    with snapshot.restore({START: region}, mode=mode, gaps="poison") as restore:
                        for _ in ("while it is served", "and afterwards"):
                            assert region.read(3 * PAGE, PAGE) == snapshot.read(
                                START + 3 * PAGE, PAGE
                            )
                            for page in (4, 6):
                                with pytest.raises(PagePoisonedError):
                                    region.read(page * PAGE, 1)
                            restore.wait()


@pytest.mark.parametrize("mode", ["copy", "minor", "map"])
@needs(Feature.POISON)
def test_gaps(mode: str) -> None:
    run_child(gaps, mode)


def gap_in_one_of_many() -> None:
    """The others are served by one call; a gap is poisoned before its region can be touched."""
    apart = 64 * PAGE
    with folder() as path, contextlib.ExitStack() as stack:
        lost = Part(1, RunState.LOST)
        write(
            path / "one",
            [(START + n * apart, [data(3, n), lost if n == 7 else zero(1)]) for n in range(20)],
        )
        snapshot = stack.enter_context(Snapshot.open(path / "one"))
        regions = {
            START + n * apart: stack.enter_context(Region.anonymous(4 * PAGE)) for n in range(20)
        }
        with snapshot.restore(regions, mode="copy", gaps="poison") as restore:
            with pytest.raises(PagePoisonedError):
                regions[START + 7 * apart].read(3 * PAGE, 1)
            restore.wait()
        for start, region in regions.items():
            assert region.read(0, 3 * PAGE) == snapshot.read(start, 3 * PAGE)
            if start != START + 7 * apart:
                assert region.read(3 * PAGE, PAGE) == bytes(PAGE)
        with pytest.raises(PagePoisonedError):
            regions[START + 7 * apart].read(3 * PAGE, 1)


@needs(Feature.POISON)
def test_a_gap_in_one_of_many() -> None:
    run_child(gap_in_one_of_many)


def bad_arguments() -> None:
    with folder() as path:
        write(path / "one", [(START, [data(4)]), (START + 16 * PAGE, [zero(4)])])
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(4 * PAGE) as region:
            bad: list[tuple[Any, dict[str, Any]]] = [
                ({}, {}),
                ({START + 1: region}, {}),
                ({START + PAGE: region}, {}),  # reaches behind the end
                ({START + 8 * PAGE: region}, {}),  # was not mapped
                ([(START, region), (START + 16 * PAGE, region)], {}),
                ({-PAGE: region}, {}),
                ({START: region}, {"mode": "fast"}),
                ({START: region}, {"gaps": "keep"}),
                ({START: region}, {"verify": True}),
                ({START: region}, {"threads": 0}),
                ({START: region}, {"rate": 0}),
                ({START: region}, {"rate": 0.5}),
                ({START: region}, {"rate": -1.0}),
            ]
            for regions, options in bad:
                with pytest.raises(ValueError):
                    snapshot.restore(regions, **options)
            with pytest.raises(TypeError):
                snapshot.restore([region], mode="copy")  # type: ignore[list-item]
            with pytest.raises(TypeError, match="mapping of addresses to regions"):
                snapshot.restore(region)  # type: ignore[arg-type]
            with Region.memfd(4 * PAGE) as shared:
                for mode in ("minor", "map"):
                    with pytest.raises(ValueError, match="private anonymous"):
                        snapshot.restore({START: shared}, mode=mode)
            # Nothing has happened to it.
            assert region.read() == bytes(4 * PAGE)
            for mode in ("copy", "minor", "map"):
                with pytest.raises(ValueError, match="already"):
                    snapshot.restore({START: region}, mode=mode)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    run_child(bad_arguments)


def served_by_others() -> None:
    """No method ends what a handler, a tracker or another restore does."""
    with folder() as path:
        write(path / "one", [(START, [data(8)])])
        with Snapshot.open(path / "one") as snapshot:
            for mode in ("auto", "copy", "minor", "map"):
                options: dict[str, Any] = {"mode": mode}
                with lazy(b"L" * 8 * PAGE) as memory:
                    for region in (memory, memory[: 2 * PAGE]):
                        with pytest.raises(RangeBusyError):
                            snapshot.restore({START: region}, **options)
                    assert memory.read() == b"L" * 8 * PAGE
                with Region.anonymous(4 * PAGE) as region:
                    with snapshot.restore({START: region}, mode="copy", paused=True) as first:
                        with pytest.raises(RangeBusyError):
                            snapshot.restore({START + 4 * PAGE: region}, **options)
                        first.resume()
                        assert first.wait(30)
                    assert region.read() == snapshot.read(START, 4 * PAGE)


def test_served_by_others() -> None:
    run_child(served_by_others)


# Damage


def flipped() -> None:
    """A changed byte is found before its page is filled, and is named; all else comes."""
    pages = 4 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        at = PIECE + 5 * PAGE + 17
        with open(path / "one" / "pages", "r+b") as file:
            file.seek(at)
            file.write(bytes([good[at] ^ 1]))
        with Snapshot.open(path / "one") as snapshot:
            for mode in ("copy", "minor", "map"):
                with Region.anonymous(pages * PAGE) as region, pytest.raises(SnapshotFormatError):
                    snapshot.restore({START: region}, mode=mode, verify="first")
            for mode in ("copy", "minor"):
                with Region.anonymous(pages * PAGE) as region:
                    with snapshot.restore({START: region}, mode=mode) as restore:  # type: ignore[arg-type]
                        with pytest.raises(SnapshotFormatError) as caught:
                            restore.wait(30)
                        assert caught.value.offset == PIECE
                        assert not restore.done
                    assert region.read(0, PIECE) == good[:PIECE]
                    assert region.read(2 * PIECE, 2 * PIECE) == good[2 * PIECE :]
                    for place in (PIECE, at):
                        with pytest.raises(PagePoisonedError):
                            region.read(place, 1)
            # Mapped: the file's content is there at once, and the background says what it found.
            for mode in ("map", "auto"):
                with Region.anonymous(pages * PAGE) as region:
                    restored = snapshot.restore({START: region}, mode=mode, paused=True)  # type: ignore[arg-type]
                    with restored as restore:
                        assert restore.method == "map"
                        assert not restore.wait(0)
                        restore.resume()
                        with pytest.raises(SnapshotFormatError) as caught:
                            restore.wait(30)
                        assert caught.value.offset == PIECE
                    assert region.read(at, 1) == bytes([good[at] ^ 1])
            # As it was asked for: nobody looks.
            with Region.anonymous(pages * PAGE) as region:
                with snapshot.restore({START: region}, mode="copy", verify="no") as restore:
                    assert restore.wait(30)
                assert region.read(at, 1) == bytes([good[at] ^ 1])


def test_a_changed_byte_is_never_used_after_it_was_checked() -> None:
    run_child(flipped)


def cut_while_served(mode: Any) -> None:
    """What a cut file still has comes; the rest is an error, and never zeros."""
    pages = 4 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        with (
            Snapshot.open(path / "one") as snapshot,
            Region.anonymous(pages * PAGE) as region,
            pytest.raises((HandlerError, SnapshotFormatError)),
            snapshot.restore({START: region}, mode=mode, verify="no", paused=True) as restore,
        ):
            assert region.read(3 * PIECE, 1) == good[3 * PIECE : 3 * PIECE + 1]
            os.truncate(path / "one" / "pages", 2 * PIECE)
            with pytest.raises(PagePoisonedError):
                region.read(3 * PIECE + PAGE, 1)
            assert region.read(PIECE, PAGE) == good[PIECE : PIECE + PAGE]
            restore.resume()
            with pytest.raises(UffdOSError):
                restore.wait(30)
            assert region.read(0, 2 * PIECE) == good[: 2 * PIECE]
            assert region.read(3 * PIECE, PAGE) == good[3 * PIECE : 3 * PIECE + PAGE]
            for page in range(2 * PIECE, 4 * PIECE, 64 * PAGE):
                if page != 3 * PIECE:
                    with pytest.raises(PagePoisonedError):
                        region.read(page, 1)
            raise HandlerError("nothing is left to be raised")
        # And before: the restore does not begin.
        with (
            pytest.raises(SnapshotFormatError),
            Snapshot.open(path / "one") as snapshot,
        ):
            pass


@pytest.mark.parametrize("mode", ["copy", "minor"])
def test_an_image_that_is_cut_while_it_is_served(mode: str) -> None:
    run_child(cut_while_served, mode)


def cut_before() -> None:
    with folder() as path:
        write(path / "one", [(START, [data(8)])])
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(8 * PAGE) as region:
            os.truncate(path / "one" / "pages", 4 * PAGE)
            for mode in ("copy", "minor", "map", "auto"):
                with pytest.raises(SnapshotFormatError):
                    snapshot.restore({START: region}, mode=mode)
            assert region.read() == bytes(8 * PAGE)


def test_an_image_that_was_cut_since_it_was_opened() -> None:
    run_child(cut_before)


def replaced_and_closed(mode: Any) -> None:
    """A restore continues with the files it began with, even if their names have changed."""
    pages = 2 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        with Region.anonymous(pages * PAGE) as region:
            snapshot = Snapshot.open(path / "one")
            want = expected(snapshot)
            with snapshot.restore({START: region}, mode=mode, paused=True) as restore:
                shutil.rmtree(path / "one")
                write(path / "one", [(START, [data(pages, 99)])])
                snapshot.close()
                assert region.read(PAGE, PAGE) == want[PAGE : 2 * PAGE]
                restore.resume()
                assert restore.wait(30)
                assert region.read() == want


@pytest.mark.parametrize("mode", ["copy", "minor", "map"])
def test_an_image_that_is_replaced_while_it_is_served(mode: str) -> None:
    run_child(replaced_and_closed, mode)


# Together, and in the middle


def two_at_once(mode: Any) -> None:
    """Restores of one snapshot know nothing of each other, and minor ones share clean pages."""
    pages = 8 * PIECE // PAGE
    with folder() as path:
        chain(path, pages, 1)
        with Snapshot.open(path / "1") as snapshot, contextlib.ExitStack() as stack:
            want = expected(snapshot)
            regions = [stack.enter_context(Region.anonymous(pages * PAGE)) for _ in range(3)]
            restores = [
                stack.enter_context(snapshot.restore({START: region}, mode=mode))
                for region in regions[:2]
            ]
            faulters = [threading.Thread(target=region.touch) for region in regions[:2]]
            for each in faulters:
                each.start()
            regions[0].write(7 * PAGE, b"mine")
            for each in faulters:
                each.join()
            for restore in restores:
                assert restore.wait(30)
            assert regions[1].read() == want
            assert regions[0].read() == want[: 7 * PAGE] + b"mine" + want[7 * PAGE + 4 :]
            third = stack.enter_context(snapshot.restore({START: regions[2]}, mode=mode))
            assert third.wait(30)
            assert regions[2].read() == want
            if mode == "minor":
                assert "already" in third.why or "everything" in third.why
                regions[2].touch()
                assert private_pages(regions[2]) <= 8  # not a copy
                assert shared_pages(regions[2]) >= pages * 9 // 10


def private_pages(region: Region) -> int:
    return _smaps(region, "Anonymous:")


def shared_pages(region: Region) -> int:
    return _smaps(region, "Rss:") - _smaps(region, "Anonymous:")


def _smaps(region: Region, field: str) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(each, 16) for each in head.split("-"))
            inside = start < region.start + region.length and region.start < end
        elif inside and head == field:
            total += int(line.split()[1]) // 4
    return total


@pytest.mark.parametrize("mode", ["copy", "minor", "map"])
def test_several_restores_of_one_snapshot(mode: str) -> None:
    run_child(two_at_once, mode, budget_s=30)


def stopped_in_the_middle(mode: Any) -> None:
    """What is not there yet raises SIGBUS afterwards; it never reads as zeros."""
    pages = 8 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(pages * PAGE) as region:
            with snapshot.restore({START: region}, mode=mode, rate=1.0) as restore:
                assert not restore.wait(0)
                assert region.read(5 * PIECE, PAGE) == good[5 * PIECE : 5 * PIECE + PAGE]
            assert restore.closed
            assert not restore.done
            assert not restore.wait(1)
            lost = 0
            looked = range(0, pages * PAGE, 32 * PAGE)
            for at in looked:
                try:
                    found = region.read(at, PAGE)
                except PagePoisonedError:
                    lost += 1
                else:
                    assert found == good[at : at + PAGE]
            assert len(looked) // 2 < lost < len(looked)
            # Another one can begin.
            with (
                Region.anonymous(pages * PAGE) as other,
                snapshot.restore({START: other}, mode=mode) as restore,
            ):
                assert restore.wait(30)
                assert other.read() == good


@pytest.mark.parametrize("mode", ["copy", "minor"])
def test_a_restore_that_is_stopped_in_the_middle(mode: str) -> None:
    run_child(stopped_in_the_middle, mode)


def closed_region(mode: Any) -> None:
    """A region that is closed while it is filled is no longer filled; others are."""
    pages = 4 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)]), (START + (1 << 30), [data(pages, 1)])])
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(pages * PAGE) as kept:
            goes = Region.anonymous(pages * PAGE)
            regions = {START: goes, START + (1 << 30): kept}
            with snapshot.restore(regions, mode=mode, paused=True) as restore:
                goes.touch(0, PAGE)
                goes.close()
                restore.resume()
                assert restore.wait(30)
                assert kept.read() == snapshot.read(START + (1 << 30), pages * PAGE)


@pytest.mark.parametrize("mode", ["copy", "minor"])
def test_a_region_that_is_closed_meanwhile(mode: str) -> None:
    run_child(closed_region, mode)


def dropped_by_its_owner() -> None:
    """Memory that the owner drops before it was filled is zeros, and stays so."""
    import mmap

    pages = 4 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(pages * PAGE) as region:
            with snapshot.restore({START: region}, mode="copy", paused=True) as restore:
                region.madvise(mmap.MADV_DONTNEED, PIECE, PIECE)
                restore.resume()
                assert restore.wait(30)
            assert region.read() == good[:PIECE] + bytes(PIECE) + good[2 * PIECE :]


def test_dropped_memory_does_not_come_back() -> None:
    run_child(dropped_by_its_owner)


def ctrl_c() -> None:
    """KeyboardInterrupt ends the wait; the restore continues, and ends with its block."""
    import signal

    pages = 4 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(pages * PAGE) as region:
            with snapshot.restore({START: region}, mode="copy", paused=True) as restore:
                # It may be ignored, as in a shell's job in the background.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    restore.wait()
                assert region.read(PAGE, 8) == good[PAGE : PAGE + 8]
                restore.resume()
                assert restore.wait(30)
            assert region.read() == good


def test_ctrl_c() -> None:
    run_child(ctrl_c)


def steering() -> None:
    """Rate, pause, order, threads, a handler of the caller's."""
    pages = 16 * PIECE // PAGE
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        good = (path / "one" / "pages").read_bytes()
        with Snapshot.open(path / "one") as snapshot:
            with (
                Region.anonymous(pages * PAGE) as region,
                snapshot.restore({START: region}, mode="copy", paused=True, threads=3) as restore,
            ):
                assert restore.paused
                hot = restore.load_first(
                    [(START + 9 * PIECE, START + 9 * PIECE + PAGE), (0, PAGE), (START, START + 1)]
                )
                assert not hot.wait(0.01)
                restore.rate = 1.0
                restore.resume()
                assert hot.wait(30) or not hot.wait(0)
                restore.rate = None
                assert restore.wait(30)
                assert region.read() == good
                assert restore.load_first([(START, START + PAGE)]).wait(1)
            with (
                Region.anonymous(pages * PAGE) as region,
                Userfaultfd() as uffd,
                Handler(uffd, fault_log=10) as handler,
                snapshot.restore({START: region}, handler=handler, paused=True) as restore,
            ):
                assert (restore.method, "handler" in restore.why) == ("copy", True)
                region.read(3 * PAGE, 1)
                assert handler.take_faults().offsets(region).tolist() == [3 * PAGE]
                restore.resume()
                assert restore.wait(30)
                assert region.read() == good
                assert handler.spaces == 1  # it runs on
                assert restore.stats.faults == 1


def test_steering() -> None:
    run_child(steering)


def choices() -> None:
    """`auto` says why it does not map."""
    pages = 600
    with folder() as path:
        write(path / "one", [(START, [data(pages)])])
        with Snapshot.open(path / "one") as snapshot, Region.anonymous(pages * PAGE) as region:
            placed = [_content.Placed([snapshot._image], START, region)]
            with contextlib.closing(_content.Files([snapshot._image])) as files:
                assert _restore_map.why_slower(placed, files) is None
                file = files.sources[0]
                assert file is not None
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                cold, probes = _restore_map._cold(placed, files)
                assert probes > 200
                if cold > probes // 2:  # a tmpfs has no colder place
                    assert "page cache" in str(_restore_map.why_slower(placed, files))


def test_auto_copies_a_cold_image() -> None:
    run_child(choices)


def test_the_model_of_pieces() -> None:
    """All data are in one piece each, and no piece has more than it may."""
    with folder() as path:
        pages = 3000
        chain(path, pages, 4)
        with Snapshot.open(path / "4") as snapshot:
            images = _content.chain_of(snapshot._image)

            class Anywhere:
                start, length, page_size = 0, pages * PAGE, PAGE

            placed = _content.Placed(images, START, Anywhere())
            covered = sorted(placed.pieces())
            assert sum(size for _, _, size in covered) == placed.chain.data_bytes
            assert all(size <= PIECE for _, _, size in covered)
            have = [
                part
                for part in snapshot._image.parts(START, START + pages * PAGE)
                if part.run is not None and part.run.state is RunState.DATA
            ]
            assert sum(part.end - part.start for part in have) == placed.chain.data_bytes
            for part in have:
                at = part.start - START
                while at < part.end - START:
                    inside = [each for each in covered if each[0] <= at < each[1]]
                    assert len(inside) == 1
                    at = inside[0][1]
            assert _images.START == START
