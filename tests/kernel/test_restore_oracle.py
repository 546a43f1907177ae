"""Random snapshots, written or taken of a process, restored, compared with a reader of our own.

The reader shares no code with pyuffd, and the process changes its memory as a copy here does.
PYUFFD_SEED is the first seed of the long run, PYUFFD_SOAK_S its seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyuffd import (
    Feature,
    Handler,
    PagePoisonedError,
    Process,
    Region,
    Restore,
    RunState,
    Snapshot,
    SnapshotError,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import needs, needs_privilege
from tests._changing import Changing
from tests._child import run_child
from tests._image_reader import ABSENT, LOST, PAGE, SHARED, Reader
from tests._memory import memory_of, memory_params
from tests._random_images import Images
from tests.process._core import Core

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE | Feature.POISON)
SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
SOAK_S = float(os.environ.get("PYUFFD_SOAK_S", "60"))
WAIT_S = 60.0
GAPS = {RunState.ABSENT: ABSENT, RunState.LOST: LOST, RunState.SHARED: SHARED}
# Each restore of compressed snapshots starts a helper process.
PACKED_EVERY = 10
# The exception of each looks through /proc.
POISONED_MOST = 5
# Each starts a process.
TAKEN_EVERY = 7
TOUCHES, MARK = 12, b"written by the program"


class Part(NamedTuple):
    """A part of a process's memory."""

    start: int
    length: int


class Span:
    """A part of a snapshot, the memory that it is restored to, and what must be there."""

    def __init__(self, reader: Reader, start: int, region: Region) -> None:
        self.start, self.region = start, region
        found, self.gaps = reader.content(start, region.length)
        self.content = bytearray(found)

    def touch(self, rng: random.Random, *, poisons: bool) -> None:
        """Read or write somewhere, before it is filled or afterwards."""
        at = rng.randrange(0, self.region.length, PAGE)
        if poisons and at in self.gaps:
            return
        if rng.random() < 0.7:
            length = rng.choice((8, PAGE))
            assert self.region.read(at, length) == self.content[at : at + length], hex(at)
        else:
            inside = at + rng.randrange(PAGE - len(MARK))
            self.region.write(inside, MARK)
            self.content[inside : inside + len(MARK)] = MARK

    def check(self, *, poisons: bool) -> None:
        """Compare every byte."""
        if not poisons or not self.gaps:
            assert self.region.read() == self.content
            return
        for at in range(0, self.region.length, PAGE):
            if at not in self.gaps:
                assert self.region.read(at, PAGE) == self.content[at : at + PAGE], hex(at)
        for at in list(self.gaps)[:: -(-len(self.gaps) // POISONED_MOST)]:
            with pytest.raises(PagePoisonedError):
                self.region.read(at, 1)

    def check_some(self) -> None:
        """Compare what is there after an early end; what is not is never zeros instead."""
        poisoned = 0
        for at in range(0, self.region.length, PAGE):
            try:
                found = self.region.read(at, PAGE)
            except PagePoisonedError:
                if (poisoned := poisoned + 1) == POISONED_MOST:
                    return
            else:
                assert found == self.content[at : at + PAGE], hex(at)


def mapped(reader: Reader) -> list[tuple[int, int]]:
    """Return what is mapped; regions without a gap between them as one."""
    found: list[tuple[int, int]] = []
    for start, end, _ in reader.regions:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def read_all(reader: Reader, snapshot: Snapshot) -> None:
    """Compare states and content as the snapshot's own methods tell them."""
    snapshot.verify()
    for start, end in mapped(reader):
        content, gaps = reader.content(start, end - start)
        for at in range(0, end - start, PAGE):
            state = snapshot.state(start + at)
            if at in gaps:
                assert GAPS[state] == gaps[at]  # type: ignore[index]
            else:
                assert snapshot.read(start + at, PAGE) == content[at : at + PAGE], hex(start + at)


class Case:
    """One restore with random options."""

    def __init__(self, rng: random.Random, reader: Reader, snapshot: Snapshot, name: str) -> None:
        self._rng, self._reader, self._snapshot, self._name = rng, reader, snapshot, name
        is_plain = name == "anon"
        self.mode = rng.choice(("copy", "minor", "map", "auto") if is_plain else ("copy", "auto"))
        self.options: dict[str, Any] = {
            "mode": self.mode,
            "verify": rng.choice(("first", "drain", "no")),
            "threads": rng.choice((1, 2, 3)),
            "paused": rng.random() < 0.7,
        }
        if self.mode != "map" and rng.random() < 0.2:
            self.options |= {"record": "hot", "record_until": WAIT_S}
        if rng.random() < 0.4:
            self.options["working_set"] = "hot"

    @property
    def _is_packed(self) -> bool:
        reader: Reader | None = self._reader
        while reader is not None and reader.manifest["compression"] is None:
            reader = reader.parent
        return reader is not None

    def _spans(self, open_: contextlib.ExitStack) -> list[Span]:
        rng = self._rng
        memory = open_.enter_context(contextlib.closing(memory_of(self._name)))
        spans: list[Span] = []
        parts = mapped(self._reader)
        for start, end in rng.choices(parts, k=rng.choice((1, 1, 2, 4))):
            first = rng.choice((start, rng.randrange(start, end, PAGE)))
            most = (end - first) // memory.page_size
            if most:
                length = rng.choice((most, rng.randint(1, most)))
                spans.append(Span(self._reader, first, memory.pages(length)))
        return spans

    def run(self) -> str | None:
        """Restore, touch it meanwhile, and compare; return the method, or None if it cannot."""
        with contextlib.ExitStack() as open_:
            spans = self._spans(open_)
            if not spans:
                return None
            pairs = [(span.start, span.region) for span in spans]
            poisons = False
            if any(span.gaps for span in spans):
                with pytest.raises(SnapshotError, match="does not have"):
                    self._snapshot.restore(pairs, **self.options)
                poisons = self._rng.random() < 0.5
                self.options["gaps"] = "poison" if poisons else "zeros"
            if self.mode == "copy" and "record" not in self.options and self._rng.random() < 0.2:
                uffd = open_.enter_context(Userfaultfd(features=Feature.EVENT_REMOVE))
                driver: Any = "process" if self._is_packed else "native"
                workers = self._rng.choice((1, 3))
                handler = open_.enter_context(Handler(uffd, driver=driver, workers=workers))
                self.options["handler"] = handler
            try:
                restore = self._snapshot.restore(pairs, **self.options)
            except ValueError as error:
                if not self._may_refuse(str(error), poisons=poisons):
                    raise
                return None
            ends_early = self._rng.random() < 0.15
            with restore:
                self._use(restore, spans, poisons=poisons)
                if not ends_early:
                    assert restore.wait(WAIT_S)
                    assert restore.done
                    assert restore.progress.bytes == restore.progress.total
            for span in spans:
                if ends_early and not restore.done:
                    span.check_some()
                else:
                    span.check(poisons=poisons)
            return restore.method

    def _may_refuse(self, why: str, *, poisons: bool) -> bool:
        """Whether docs/restore.md says that this cannot be."""
        return (poisons and (self.mode in ("map", "minor") or "is a part of a page" in why)) or (
            # What cannot be made smaller is in the file as it is, and not aligned there.
            self.mode == "map" and self._is_packed and ("compressed" in why or "aligned" in why)
        )

    def _use(self, restore: Restore, spans: list[Span], *, poisons: bool) -> None:
        rng = self._rng
        beside: list[BaseException] = []

        def touch(span: Span, seed: int) -> None:
            other = random.Random(seed)
            try:
                for _ in range(TOUCHES):
                    span.touch(other, poisons=poisons)
            except BaseException as error:
                beside.append(error)

        for _ in range(rng.choice((0, TOUCHES))):
            rng.choice(spans).touch(rng, poisons=poisons)
        restore.stop_recording()
        threads = [
            threading.Thread(target=touch, args=(span, rng.randrange(1 << 32))) for span in spans
        ]
        for thread in threads:
            thread.start()
        restore.resume()
        for thread in threads:
            thread.join()
        assert not beside, beside
        assert restore.record_error is None


def flattened(reader: Reader, snapshot: Snapshot, path: Path) -> None:
    snapshot.flatten(path, durable=False)
    flat = Reader(path)
    assert flat.parent is None
    assert mapped(flat) == mapped(reader)
    for start, end in mapped(reader):
        assert flat.content(start, end - start) == reader.content(start, end - start)


def one(seed: int, name: str) -> list[str | None]:
    """Write a chain, and restore some of it; return by which methods."""
    rng = random.Random(seed)
    done: list[str | None] = []
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        packs, large = not seed % PACKED_EVERY, name.startswith("hugetlb")
        paths = Images(Path(folder), seed, packs=packs, large=large).paths
        for path in dict.fromkeys((paths[-1], rng.choice(paths))):
            reader = Reader(path)
            with Snapshot.open(path) as snapshot:
                read_all(reader, snapshot)
                done += [Case(rng, reader, snapshot, name).run() for _ in range(3)]
                if rng.random() < 0.2:
                    flattened(reader, snapshot, Path(folder) / f"flat-{path.name}")
    return done


def taken(seed: int, name: str) -> list[str | None]:
    """Snapshot a process that changes its memory, and restore some of it; return the methods."""
    rng = random.Random(seed)
    done: list[str | None] = []
    parent: Path | None = None
    with (
        tempfile.TemporaryDirectory(prefix="oracle-") as folder,
        Changing(seed) as process,
        Process(process.pid) as target,
    ):
        # Snapshots of the whole process have registers, which a core needs.
        is_whole = rng.random() < 0.3
        parts = [Part(start, len(content)) for start, content in process.areas]
        for number in range(rng.choice((1, 2, 3))):
            process.change()
            path = Path(folder) / str(number)
            Snapshot.take(
                target,
                path,
                method=rng.choice(("stopped", "cow", "precopy")),
                ranges=None if is_whole else parts,
                shared="skip",
                parent=parent if rng.random() < 0.7 else None,
                max_stall_s=WAIT_S,  # however busy the machine is
                durable=False,
            )
            reader = Reader(path)
            for start, content in process.areas:
                assert reader.content(start, len(content))[0] == content, hex(start)
            with Snapshot.open(path) as snapshot:
                read_all(reader, snapshot)
                if is_whole:
                    file = path.with_suffix(".core")
                    snapshot.write_core(file)
                    with Core(file) as core:
                        for start, content in process.areas:
                            assert core.read(start, len(content)) == bytes(content), hex(start)
                done += [Case(rng, reader, snapshot, name).run() for _ in range(2)]
            parent = path
    return done


def some(
    name: str, seed: int, count: int, seconds: float, *, takes: bool = False
) -> tuple[int, list[str]]:
    """Return how many seeds were done, and by which methods; `takes` snapshots of processes too."""
    until = time.monotonic() + seconds
    methods: set[str] = set()
    done = 0
    while done < count and time.monotonic() < until:
        try:
            program = taken if takes and not (seed + done) % TAKEN_EVERY else one
            methods.update(filter(None, program(seed + done, name)))
        except BaseException:
            print(f"seed {seed + done} of {name}")
            raise
        done += 1
    return done, sorted(methods)


# Seeds of the short run: all modes, and one compressed chain, which needs a helper process once.
FEW = {"anon": range(26, 31)}
OTHERS = range(1, 3)
FEW_TAKEN = (1, 3)


# A process that is to be snapshotted is stopped, and its page table read.
can_watch = needs(Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM)
can_stop = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")


@pytest.mark.parametrize("name", memory_params())
def test_random_snapshots(name: str) -> None:
    seeds = FEW.get(name, OTHERS)
    _, methods = run_child(some, name, seeds.start, len(seeds), WAIT_S, budget_s=60).value
    assert methods == (["copy", "map", "minor"] if name == "anon" else ["copy"])


def some_taken(seeds: Sequence[int]) -> list[list[str | None]]:
    return [taken(seed, "anon") for seed in seeds]


@can_watch
@can_stop
def test_random_process() -> None:
    done = run_child(some_taken, FEW_TAKEN, budget_s=60).value
    assert all(any(methods) for methods in done)


@can_watch
@can_stop
@pytest.mark.stress
@pytest.mark.parametrize("name", memory_params())
def test_many_random_snapshots(name: str) -> None:
    seconds = SOAK_S / 5
    count, _ = run_child(
        some, name, SEED, 1 << 30, seconds, takes=True, budget_s=seconds + 2 * WAIT_S
    ).value
    print(f"{count} chains on {name}, from seed {SEED}")


class Gaps:
    """A restore of which parts are unmapped or mapped over, before it begins or meanwhile."""

    def __init__(self, rng: random.Random, spans: Sequence[Span]) -> None:
        self._rng, self._spans = rng, spans
        self._other: dict[int, bytes | None] = {}  # what is at an address instead; None: nothing
        self.log: list[str] = []

    def change(self) -> None:
        rng = self._rng
        region = rng.choice(self._spans).region
        pages = region.length // PAGE
        first = rng.randrange(pages)
        start, count = region.start + first * PAGE, rng.randint(1, min(pages - first, 40))
        how = rng.choice(("unmapped", "private", "shared"))
        self.log.append(f"{count} pages at {start:#x} {how}")
        if how == "unmapped":
            _memory.munmap(start, count * PAGE)
        # No other memory may come there.
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if how == "shared" else mmap.MAP_PRIVATE)
        access = 0 if how == "unmapped" else mmap.PROT_READ | mmap.PROT_WRITE
        _memory.mmap(count * PAGE, access, flags | MAP_FIXED, address=start)
        for at in range(start, start + count * PAGE, PAGE):
            self._other[at] = None if how == "unmapped" else bytes(PAGE)

    def touch(self, count: int) -> None:
        for _ in range(count):
            span = self._rng.choice(self._spans)
            offset = self._rng.randrange(0, span.region.length, PAGE)
            self.check(span, offset)
            at = span.region.start + offset
            if self._rng.random() < 0.3 and self._other.get(at, b"") is not None:
                _memory.write(at, MARK.ljust(PAGE))
                if at in self._other:
                    self._other[at] = MARK.ljust(PAGE)
                else:
                    span.content[offset : offset + PAGE] = MARK.ljust(PAGE)

    def check(self, span: Span, offset: int, *, has_ended_early: bool = False) -> None:
        at = span.region.start + offset
        expected = self._other.get(at, bytes(span.content[offset : offset + PAGE]))
        if expected is None:
            return
        try:
            found = _memory.read(at, PAGE)
        except PagePoisonedError:
            assert has_ended_early, (hex(at), self.log)
            assert at not in self._other, (hex(at), self.log)
        else:
            assert found == expected, (hex(at), self.log)

    def run(self, restore: Restore) -> None:
        rng = self._rng
        ends_early = rng.random() < 0.3
        with restore:
            for resumes in (not ends_early, False):
                for _ in range(rng.randint(0, 3)):
                    self.change()
                    self.touch(rng.randint(0, 5))
                if resumes:
                    restore.resume()
            assert ends_early or restore.wait(WAIT_S), self.log
        for span in self._spans:
            for offset in range(0, span.region.length, PAGE):
                self.check(span, offset, has_ended_early=ends_early)


def beside_gaps(seed: int) -> str | None:
    """Restore some of a random snapshot beside gaps; return the method, or None if it cannot."""
    rng = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="oracle-") as folder,
        contextlib.ExitStack() as open_,
    ):
        path = Images(Path(folder), seed, packs=False, large=False).paths[-1]
        reader = Reader(path)
        snapshot = open_.enter_context(Snapshot.open(path))
        case = Case(rng, reader, snapshot, "anon")
        spans = case._spans(open_)
        options: dict[str, Any] = {"mode": case.mode, "threads": rng.choice((1, 3))}
        if any(span.gaps for span in spans):
            options["gaps"] = "zeros"
        if case.mode == "copy" and rng.random() < 0.3:
            uffd = open_.enter_context(Userfaultfd(features=LAYOUT))
            options["handler"] = open_.enter_context(Handler(uffd))
        pairs = [(span.start, span.region) for span in spans]
        try:
            restore = snapshot.restore(pairs, paused=True, **options)
        except ValueError:
            return None
        Gaps(rng, spans).run(restore)
        return restore.method


def many_beside_gaps(seed: int, count: int, seconds: float) -> int:
    until = time.monotonic() + seconds
    done = 0
    while done < count and time.monotonic() < until:
        try:
            beside_gaps(seed + done)
        except BaseException:
            print(f"seed {seed + done}")
            raise
        done += 1
    return done


LAYOUT = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
MAP_FIXED = 0x10


@needs(Feature.EVENT_UNMAP)
def test_random_gaps() -> None:
    assert run_child(many_beside_gaps, SEED, 12, WAIT_S, budget_s=2 * WAIT_S).value


@needs(Feature.EVENT_UNMAP)
@pytest.mark.stress
def test_many_random_gaps() -> None:
    seconds = SOAK_S / 5
    count = run_child(many_beside_gaps, SEED, 1 << 30, seconds, budget_s=seconds + WAIT_S).value
    print(f"{count} restores beside gaps, from seed {SEED}")
