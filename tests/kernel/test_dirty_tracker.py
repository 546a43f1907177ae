"""`DirtyTracker` on memory of this process: rounds, their promises, and bad arguments."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from pyuffd import (
    BlindReason,
    ClosedError,
    DirtyTracker,
    Feature,
    PageRanges,
    Process,
    RangeBusyError,
    Region,
    UnsupportedFeatureError,
    Userfaultfd,
    _memory,
    _vmas,
)
from pyuffd import _dirty_calls as calls
from pyuffd._dirty_calls import Track, TrackedRows
from pyuffd.dirty import Mapped, Unmapped, _async, _rows
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE, Memory, memory_of, memory_params
from tests._tracked import note_runs
from tests.kernel._dirty_oracle import ANON, MAP_FIXED, MREMAP_MAYMOVE_FIXED, call

pytestmark = needs(Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM)
FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    made = memory_of(request.param)
    yield made
    made.close()


def pages(region: Region, ranges: PageRanges) -> list[int]:
    size = region.page_size
    return [
        index
        for item in ranges
        for index in range((item.start - region.start) // size, (item.end - region.start) // size)
    ]


@pytest.mark.parametrize("memory", memory_params(), indirect=True)
def test_rounds_have_what_was_written(memory: Memory) -> None:
    region = memory.pages(8)
    region.write(0, b"before")
    with DirtyTracker(region) as tracker:
        assert not tracker.collect().written
        region.write(3 * region.page_size, b"x")
        region.write(5 * region.page_size, b"x")
        assert pages(region, tracker.peek().written) == [3, 5]
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [3, 5]
            assert round_.seconds > 0
        assert tracker.rate > 0
        region.write(0, b"x")
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [0, 3, 5], "it was not committed"
            round_.commit()
        with tracker.collect() as round_:
            assert not round_.written


@pytest.mark.parametrize("memory", memory_params("anon", "shmem", "shmem-private"), indirect=True)
def test_rounds_of_any_number_of_ranges(memory: Memory) -> None:
    """A round has room for what the last one found, and finds more or less than that."""
    region = memory.pages(4096)
    region.fill(1)
    with DirtyTracker(region) as tracker:
        tracker.collect().commit()
        for step, count in ((1000, 3), (2, 2048), (3, 1300), (2, 0), (2, 2048), (1, 5)):
            expected = list(range(0, count * step, step))
            for index in expected:
                _memory.write(region.start + index * PAGE, b"x")
            assert pages(region, tracker.peek().written) == expected
            with tracker.collect() as round_:
                assert pages(region, round_.written) == expected
                assert not round_.dropped
                round_.commit()


@pytest.mark.parametrize(
    "method", ["wp-async", pytest.param("wp-sync", marks=needs_kernel_faults())]
)
def test_an_exception_loses_nothing(method: Any) -> None:
    with Region.anonymous(4 * PAGE) as region, DirtyTracker(region, method=method) as tracker:
        assert tracker.method == method
        region.write(PAGE, b"x")
        with pytest.raises(OSError), tracker.collect():
            raise OSError(28, "no space left")
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [1]
            round_.commit()
            assert round_.committed


def test_only_the_last_round_is_committed_and_once() -> None:
    with Region.anonymous(PAGE) as region, DirtyTracker(region) as tracker:
        first, second = tracker.collect(), tracker.collect()
        with pytest.raises(ValueError, match="later round"):
            first.commit()
        second.commit()
        with pytest.raises(ValueError, match="already"):
            second.commit()
        with pytest.raises(ValueError, match="peek"):
            tracker.peek().commit()


def test_dropped_pages_read_as_zeros() -> None:
    with Region.anonymous(8 * PAGE) as region, DirtyTracker(region) as tracker:
        region.fill(1)
        tracker.collect().commit()
        region.madvise(mmap.MADV_DONTNEED, PAGE, 2 * PAGE)
        region.write(PAGE, b"again")
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [1]
            assert pages(region, round_.dropped) == [2]
        region.write(2 * PAGE, b"again")
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [1, 2], "written is no longer dropped"
            assert not round_.dropped


def rounds_of_a_sparse_mapping(dense_bytes: int) -> None:
    """Memory that is mostly holes: they are not protected, and make no page tables."""
    _rows.DENSE_BYTES = dense_bytes
    count = 64 << 20 >> 12
    with Region.anonymous(count * PAGE, noreserve=True) as region:
        region.write(100 * PAGE, b"before")
        before = page_tables()
        with DirtyTracker(region) as tracker:
            (row,) = tracker._method._rows  # type: ignore[attr-defined]
            if not dense_bytes:
                assert row.track is Track.SPARSE
                assert page_tables() - before < 64, "KiB: only what the pages need themselves"
            assert not tracker.collect().written
            region.write(100 * PAGE, b"x")
            region.write(9000 * PAGE, b"x")
            with tracker.collect() as round_:
                assert pages(region, round_.written) == [100, 9000]
                assert not round_.dropped
                round_.commit()
            region.madvise(mmap.MADV_DONTNEED, 100 * PAGE, PAGE)
            with tracker.collect() as round_:
                assert not round_.written
                assert pages(region, round_.dropped) == [100]
                round_.commit()
            assert not tracker.collect().dropped
            region.madvise(mmap.MADV_DONTNEED, 8704 * PAGE, 1024 * PAGE)
            with tracker.collect() as round_:
                assert 9000 in pages(region, round_.dropped)


def page_tables() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmPTE"))


@pytest.mark.parametrize("dense_bytes", [0, 1 << 40], ids=["sparse", "dense"])
def test_mostly_holes(dense_bytes: int) -> None:
    run_child(rounds_of_a_sparse_mapping, dense_bytes)


def rounds_where_holes_are_asked_for_apart(name: str) -> None:
    """As on kernels whose one scan does not see dropped pages."""
    _async.sees_holes = lambda: False  # type: ignore[assignment]
    memory = memory_of(name)
    region = memory.pages(8)
    region.fill(1)
    with DirtyTracker(region) as tracker:
        region.write(2 * region.page_size, b"x")
        assert pages(region, tracker.peek().written) == [2]
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [2]
            round_.commit()
        if not memory.is_hugetlb:
            region.write(3 * region.page_size, b"x")
            region.madvise(mmap.MADV_DONTNEED, 3 * region.page_size, region.page_size)
            with tracker.collect() as round_:
                assert pages(region, round_.written) + pages(region, round_.dropped) == [3]
                round_.commit()
        assert not tracker.collect().written
    memory.close()


@pytest.mark.parametrize("name", memory_params())
def test_holes_apart(name: str) -> None:
    run_child(rounds_where_holes_are_asked_for_apart, name)


def new_memory_at_the_same_place() -> None:
    """MAP_FIXED sends no event; the memory is not registered, which reveals it."""
    with Region.anonymous(8 * PAGE) as region, DirtyTracker(region) as tracker:
        region.fill(1)
        tracker.collect().commit()
        _memory.munmap(region.start + 6 * PAGE, 2 * PAGE)
        _memory.mmap(2 * PAGE, READ_WRITE, FIXED, address=region.start + 2 * PAGE)
        region.write(2 * PAGE, b"new")
        with tracker.collect() as round_:
            assert pages(region, round_.written) == [2]
            assert pages(region, round_.dropped) == [3]
            kinds = {type(change) for change in round_.layout}
            assert kinds == {Mapped, Unmapped}
            gone = [c for c in round_.layout if isinstance(c, Unmapped)]
            assert (region.start + 6 * PAGE, region.start + 8 * PAGE) in [
                (change.start, change.end) for change in gone
            ]
            round_.commit()
        region.write(2 * PAGE, b"seen")
        assert pages(region, tracker.collect().written) == [2]


def new_memory_with_other_permissions() -> None:
    """It does not pass for the old memory after an mprotect(2)."""
    with Region.anonymous(8 * PAGE) as region, DirtyTracker(region) as tracker:
        region.fill(1)
        tracker.collect().commit()
        _memory.mmap(2 * PAGE, mmap.PROT_READ, FIXED, address=region.start + 2 * PAGE)
        place = (region.start + 2 * PAGE, region.start + 4 * PAGE)
        with tracker.collect() as round_:
            for kind in (Mapped, Unmapped):
                found = [c for c in round_.layout if isinstance(c, kind)]
                assert place in [(change.start, change.end) for change in found]


def new_memory_among_many_mappings() -> None:
    """They are scanned together; what was written below it, in it and above it is reported."""
    with Region.anonymous(64 * PAGE) as region:
        region.fill(1)
        for page in range(0, 64, 2):
            _memory.mprotect(region.start + page * PAGE, PAGE, mmap.PROT_READ)
        with DirtyTracker(region) as tracker:
            tracker.collect().commit()
            _memory.mmap(PAGE, READ_WRITE, FIXED, address=region.start + 31 * PAGE)
            for page in (1, 31, 33, 63):
                region.write(page * PAGE, b"new")
            _memory.madvise(region.start + 5 * PAGE, PAGE, mmap.MADV_DONTNEED)
            _memory.madvise(region.start + 61 * PAGE, PAGE, mmap.MADV_DONTNEED)
            with tracker.collect() as round_:
                assert pages(region, round_.written) == [1, 31, 33, 63]
                assert pages(region, round_.dropped) == [5, 61]
                place = (region.start + 31 * PAGE, region.start + 32 * PAGE)
                for kind in (Mapped, Unmapped):
                    found = [c for c in round_.layout if isinstance(c, kind)]
                    assert [(change.start, change.end) for change in found] == [place]
                round_.commit()
            for page in (31, 35):
                region.write(page * PAGE, b"seen")
            assert pages(region, tracker.collect().written) == [31, 35]


def replaced_while_a_round_ends() -> None:
    """Between the look at the mappings and the registration of what has come in one's place."""
    with Region.anonymous(8 * PAGE) as region, DirtyTracker(region) as tracker:
        region.fill(1)
        tracker.collect().commit()
        place = region.start + 2 * PAGE
        _memory.mmap(2 * PAGE, READ_WRITE, FIXED, address=place)
        file = os.memfd_create("private")
        os.ftruncate(file, 2 * PAGE)
        register = _async.AsyncMethod._register

        def replace(
            self: _async.AsyncMethod, rows: list[_rows.Row]
        ) -> tuple[list[_rows.Row], TrackedRows]:
            if not written:
                _memory.mmap(2 * PAGE, READ_WRITE, mmap.MAP_PRIVATE | 0x10, file, address=place)
                region.write(2 * PAGE, b"new")
                written.append(2)
            return register(self, rows)

        written = list[int]()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_async.AsyncMethod, "_register", replace)
            tracker.collect().commit()
        assert written == [2]
        with tracker.collect() as round_:
            assert [type(c) for c in round_.layout] == [Unmapped, Mapped], round_.layout
            assert 2 in pages(region, round_.written)
        os.close(file)


@pytest.mark.parametrize(
    "how",
    [
        replaced_while_a_round_ends,
        new_memory_at_the_same_place,
        new_memory_with_other_permissions,
        new_memory_among_many_mappings,
    ],
)
def test_new_memory_at_the_same_place(how: Callable[[], None]) -> None:
    run_child(how)


def joined_by_a_move(is_above: bool) -> None:
    with Region.anonymous(64 * PAGE) as region:
        start = region.start
        region.write(20 * PAGE, b"data")
        # Between others, so that it is a mapping of its own, as old as the other one. Not between
        # gaps, where memory of Python's may come.
        for page, count, protection in ((0, 10, 0), (30, 34, 0), (50, 10, 3)):
            place = start + page * PAGE
            assert call("mmap", place, count * PAGE, protection, ANON | MAP_FIXED, 2**64 - 1, 0)
        with DirtyTracker(region) as tracker:
            tracker.collect().commit()
            target = start + 30 * PAGE if is_above else start
            assert call(
                *("mremap", start + 50 * PAGE, 10 * PAGE, 10 * PAGE),
                *(MREMAP_MAYMOVE_FIXED, target),
            )
            with tracker.collect() as round_:
                told = {type(change) for change in round_.layout}
                assert 20 in pages(region, round_.written), round_.layout
                assert Unmapped in told
                assert not {*pages(region, round_.written)} & {*pages(region, round_.dropped)}
                round_.commit()
            ctypes.memset(start + 21 * PAGE, 1, 1)
            with tracker.collect() as round_:
                assert pages(region, round_.written) == [21]
                round_.commit()


@pytest.mark.parametrize("is_above", [False, True], ids=["below", "above"])
def test_memory_that_is_joined_by_a_move(is_above: bool) -> None:
    """All of it loses its registration, and its pages stay protected: they are content."""
    run_child(joined_by_a_move, is_above)


def test_several_ranges_and_numpy() -> None:
    with (
        Region.anonymous(4 * PAGE) as one,
        Region.memfd(4 * PAGE) as two,
        DirtyTracker([one, two]) as tracker,
    ):
        # Not at their ends: one may be next to the other, and then such pages are one range.
        one.write(PAGE, b"x")
        two.write(2 * PAGE, b"x")
        rows = numpy.asarray(tracker.collect().written)
        assert sorted(rows[:, 0].tolist()) == sorted([one.start + PAGE, two.start + 2 * PAGE])


REASONS = {
    "anon": set(),
    "shmem": {BlindReason.SHARED, BlindReason.FILE_HOLES},
    "shmem-private": {BlindReason.FILE, BlindReason.FILE_HOLES},
    "hugetlb": {BlindReason.SHARED, BlindReason.FILE_HOLES, BlindReason.HUGE_DROPS},
    "hugetlb-private": {BlindReason.FILE_HOLES, BlindReason.HUGE_DROPS},
}


@pytest.mark.parametrize("memory", memory_params(), indirect=True)
def test_blind(memory: Memory) -> None:
    region = memory.pages(2)
    with DirtyTracker(region) as tracker:
        assert {blind.reason for blind in tracker.blind} == REASONS[memory.name]
        assert {(b.start, b.end) for b in tracker.blind} <= {
            (region.start, region.start + region.length)
        }


def test_what_another_userfaultfd_holds_is_blind() -> None:
    with Userfaultfd() as other, Region.anonymous(4 * PAGE) as region:
        other.register(region.start, PAGE)
        with DirtyTracker(region) as tracker:
            assert [(b.start, b.length, b.reason) for b in tracker.blind] == [
                (region.start, PAGE, BlindReason.BUSY)
            ]
            region.write(2 * PAGE, b"x")
            assert pages(region, tracker.collect().written) == [2]


def test_a_userfaultfd_and_its_ranges() -> None:
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Userfaultfd(features=features) as uffd, Region.anonymous(4 * PAGE) as region:
        with pytest.raises(ValueError, match="ranges="):
            DirtyTracker(uffd)
        with DirtyTracker(uffd, [region]) as tracker:
            region.write(PAGE, b"x")
            assert pages(region, tracker.collect().written) == [1]
        # The borrowed descriptor stays open, and nothing is registered with it any more.
        uffd.unregister(region)
        with Userfaultfd() as other:
            other.register(region)
            other.unregister(region)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_userfaultfd_after_others_came_between(is_split: bool) -> None:
    """The kernel unregisters nothing of a range that another userfaultfd has a part of."""
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with (
        Userfaultfd(features=features) as uffd,
        Userfaultfd() as other,
        Userfaultfd() as third,
        Region.anonymous(4 * PAGE) as region,
    ):
        if is_split:  # one mapping of each page
            for index in range(0, 4, 2):
                _memory.mprotect(region.start + index * PAGE, PAGE, mmap.PROT_READ)
        with DirtyTracker(uffd, [region]) as tracker:
            _memory.mmap(PAGE, READ_WRITE, FIXED, address=region.start + PAGE)
            other.register(region.start + PAGE, PAGE)
            assert tracker.blind is not None
        for index in (0, 2, 3):
            third.register(region.start + index * PAGE, PAGE)


def test_two_trackers_with_one_userfaultfd() -> None:
    """Of a page that both protect, only the first to ask would learn that it was written."""
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Userfaultfd(features=features) as uffd, Region.anonymous(4 * PAGE) as region:
        with DirtyTracker(uffd, [region[: 2 * PAGE]]) as tracker:
            with pytest.raises(RangeBusyError) as caught:
                DirtyTracker(uffd, [region])
            assert (caught.value.start, caught.value.length) == (region.start, 2 * PAGE)
            with DirtyTracker(uffd, [region[2 * PAGE :]]) as other:
                region.write(PAGE, b"x")
                region.write(3 * PAGE, b"x")
                assert pages(region, other.collect().written) == [3]
            assert pages(region, tracker.collect().written) == [1]
        with DirtyTracker(uffd, [region]) as tracker:  # the first one is closed
            region.write(0, b"x")
            assert pages(region, tracker.collect().written) == [0]


@needs_kernel_faults()
@pytest.mark.parametrize("method", ["wp-async", "wp-sync"])
def test_a_userfaultfd_that_is_closed_first(method: Any) -> None:
    """Nothing is registered then, and close() hides no exception of the block."""
    features = Feature.WP_UNPOPULATED
    features |= Feature.WP_ASYNC if method == "wp-async" else Feature.PAGEFAULT_FLAG_WP
    with Userfaultfd(features=features) as uffd, Region.anonymous(4 * PAGE) as region:
        with DirtyTracker(uffd, [region], method=method) as tracker:
            uffd.close()
            with pytest.raises(ClosedError):
                tracker.collect()
        assert tracker.closed


@needs_kernel_faults()
def test_a_userfaultfd_without_async_is_served() -> None:
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
    with Userfaultfd(features=features) as uffd, Region.anonymous(4 * PAGE) as region:
        with pytest.raises(UnsupportedFeatureError):
            DirtyTracker(uffd, [region], method="wp-async")
        with DirtyTracker(uffd, [region]) as tracker:
            assert tracker.method == "wp-sync"
            assert "WP_ASYNC" in tracker.reason
            region.write(PAGE, b"x")
            assert pages(region, tracker.collect().written) == [1]


def test_a_closed_tracker_leaves_nothing_registered() -> None:
    with Region.anonymous(4 * PAGE) as region:
        tracker = DirtyTracker(region)
        tracker.close()
        tracker.close()
        for call in (tracker.collect, tracker.peek, lambda: tracker.blind):
            with pytest.raises(ClosedError):
                call()
        with Process(os.getpid()) as process:
            mapping = process.mappings(details=True).at(region.start)
        assert mapping is not None
        assert "uw" not in mapping.flags


BAD: list[tuple[Any, dict[str, Any], type[Exception]]] = [
    ([], {}, ValueError),
    (5, {}, TypeError),
    (None, {}, TypeError),
    ("text", {}, TypeError),
    (Region, {}, TypeError),
]


@pytest.mark.parametrize(("target", "options", "error"), BAD)
def test_bad_targets(target: Any, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        DirtyTracker(target, **options)


def test_targets_that_are_no_memory() -> None:
    """Their items are no ranges; the error tells what a target is."""
    with pytest.raises(TypeError, match=r"target must be .* make Process\(5\)"):
        DirtyTracker(5)  # type: ignore[arg-type]
    for target in (True, None, "self", b"x", bytearray(PAGE), 1.5, Region, object()):
        with pytest.raises(TypeError, match="target must be"):
            DirtyTracker(target)  # type: ignore[arg-type]
    with open("/proc/self/stat") as file:
        with pytest.raises(TypeError, match="target must be"):
            DirtyTracker(file)  # type: ignore[arg-type]
        assert file.read(1)  # it was not read


def test_bad_options() -> None:
    with Region.anonymous(PAGE) as region:
        with pytest.raises(ValueError, match="wp-async"):
            DirtyTracker(region, method="soft-dirty")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ranges="):
            DirtyTracker(region, [region])


@pytest.mark.parametrize("count", [200, 2400])
def test_adjacent_mappings_are_registered_together(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of them: meanwhile the process can map nothing."""
    _async.sees_holes()  # asks the kernel once, with a userfaultfd of its own
    told: list[tuple[str, list[int]]] = []

    def note(name: str, spans: list[tuple[int, int]]) -> None:
        told.append((name, [(end - start) // PAGE for start, end in spans]))

    note_runs(monkeypatch, note)
    with Region.anonymous(count * PAGE) as region:
        for page in range(0, count, 2):
            region.write(page * PAGE, b"x")
            _memory.mprotect(region.start + (page + 1) * PAGE, PAGE, mmap.PROT_READ)
        with DirtyTracker(region) as tracker:
            for page in range(0, count, 50):
                region.write(page * PAGE, b"y")
            assert pages(region, tracker.collect().written) == list(range(0, count, 50))
        with Userfaultfd() as other:
            other.register(region)
    runs = [count] if count <= calls.AT_ONCE else [1000, 1000, 400]
    assert told == [("register", runs), ("unregister", runs)]


def closed_in_a_fork() -> None:
    with Region.anonymous(PAGE) as region, DirtyTracker(region) as tracker:
        pid = os.fork()
        if not pid:
            try:
                tracker.collect()
            except ClosedError:
                tracker.close()
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        region.write(0, b"x")
        assert len(tracker.collect().written) == 1


def test_closed_in_a_fork() -> None:
    run_child(closed_in_a_fork)


def refusals_without_a_cause() -> None:
    """To find the cause, smaps is read: milliseconds for each mapping, also in a stop."""
    asked: list[object] = []
    overlapping = _vmas.overlapping

    def noted(start: int, end: int, **options: Any) -> Any:
        asked.append(start)
        return overlapping(start, end, **options)

    _vmas.overlapping = noted
    with (
        Region.anonymous(PAGE) as busy,
        Region.anonymous(PAGE) as other,
        Userfaultfd() as owner,
        DirtyTracker([other]) as beside,
    ):
        owner.register(busy)
        asked.clear()
        with DirtyTracker([busy, other]) as tracker:
            assert [one.reason for one in tracker.blind] == [BlindReason.BUSY] * 2
            tracker.collect()
        assert asked == []
        beside.collect()
        with pytest.raises(RangeBusyError, match="another userfaultfd"):
            owner.register(other)
        assert asked != []


def test_refusals_that_are_expected_are_not_explained() -> None:
    run_child(refusals_without_a_cause)
