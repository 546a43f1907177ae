"""Random programs for served memory: made from a seed, checked against the model, shortened.

A program is a setting and a list of steps. A step that does not fit the setting, or the previous
steps, does nothing. So every part of a program is a program too.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import mmap
import os
import random
import select
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PagePoisonedError,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import MEMORY_TYPES, kill
from pyuffd.testing._run import SCALE
from tests._memory import memory_of
from tests._tasks import of_threads
from tests.stress._worlds import HEAD, LOST, UNWRITTEN, ZERO, A, Content, Rules, World

Step = list[Any]  # a name and its arguments, in types that JSON has

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
WP_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MINORS = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
MADV_FREE, MADV_REMOVE, MADV_PAGEOUT = 8, 9, 21
MAYMOVE, FIXED = 1, 2
SINK = "sink"
LIMIT_S = 15.0  # a program takes some hundredths of a second

SMALL_PAGES, HUGE_PAGES = 12, 4
DRIVERS = ("native", "inline", "thread", "process")
# All settings need these.
FEATURES = WP_FEATURES | MINORS | Feature.WP_UNPOPULATED | Feature.SIGBUS | Feature.POISON


@dataclass
class Setting:
    """The memory and the handler of a program."""

    memory: str = "anon"
    mode: int = int(MISSING)
    source: str = "buffer"  # zero, buffer, file, python, none
    driver: str = "native"
    events: int = 0
    unpopulated: bool = True
    prefetch: int = 0  # pages
    preserve: bool = False
    before: list[int] = field(default_factory=list)  # pages that the file has from the start


@dataclass
class Program:
    """A setting and steps, made from `seed`."""

    seed: int
    setting: Setting
    steps: list[Step]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.setting}"]
        return "\n".join([*lines, *(f"    {step}" for step in self.steps)])


# Making


def _choose_setting(chance: random.Random, drivers: tuple[str, ...], names: list[str]) -> Setting:
    name = chance.choice(names)
    driver = chance.choice(drivers)
    has_file, shared = name != "anon", MEMORY_TYPES[name].shared
    modes = [MISSING, MISSING | WP, WP]
    if has_file:
        modes += [MINOR, MINOR | WP, MISSING | MINOR, MISSING | MINOR | WP]
    mode = chance.choice(modes)
    python = driver in ("thread", "process")
    sources = ["zero", "file", "python"] if python else ["zero", "buffer", "buffer", "file"]
    if mode == WP:
        sources = ["none"]
    elif not mode & MISSING:  # only shared memory can be filled through the file
        sources = [*sources, "none"] if shared else ["none"]
    events = Feature(0)
    if driver != "inline":
        for event in (Feature.EVENT_REMOVE, Feature.EVENT_FORK):
            if chance.random() < 0.5:
                events |= event
        if chance.random() < 0.5:
            events |= Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    count = HUGE_PAGES if name.startswith("hugetlb") else SMALL_PAGES
    before = [page for page in range(count) if chance.random() < 0.3]
    return Setting(
        name,
        int(mode),
        chance.choice(sources),
        driver,
        int(events),
        chance.random() < 0.7,
        chance.choice([0, 0, 1, 4, 100]),
        mode == WP and driver != "process" and chance.random() < 0.4,
        before if has_file and chance.random() < 0.6 else [],
    )


WEIGHTS = {
    "read": 12,
    "write": 9,
    "wp": 4,
    "populate": 2,
    "fill": 3,
    "evict": 3,
    "unprotect": 2,
    "states": 4,
    "preserve": 2,
    "dontneed": 3,
    "remove": 2,
    "punch": 2,
    "free": 2,
    "pageout": 2,
    "fork": 2,
    "move": 2,
    "split": 1,
    "swap": 2,
    "file": 2,
    "restart": 1,
    "kill": 1,
}
HOW = ("here", "here", "thread", "kernel")


def make(seed: int, drivers: tuple[str, ...], names: list[str], length: int = 40) -> Program:
    """Return the program of a seed."""
    chance = random.Random(seed)
    setting = _choose_setting(chance, drivers, names)
    count = HUGE_PAGES if setting.memory.startswith("hugetlb") else SMALL_PAGES
    steps: list[Step] = []
    for number in range(length):
        (name,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        page = chance.randrange(count)
        end = min(count, page + chance.choice([1, 1, 2, 4, count]))
        if name in ("read", "write", "file"):
            steps.append([name, page, chance.choice(HOW), number])
        elif name == "fork":
            does = [
                [chance.choice(["read", "write"]), chance.randrange(count), number * 10 + i]
                for i in range(chance.randrange(1, 4))
            ]
            steps.append([name, does])
        elif name == "fill":
            steps.append([name, page, end, number])
        elif name == "preserve":
            steps.append([name, chance.random() < 0.3])
        else:
            steps.append([name, page, end])
    return Program(seed, setting, steps)


# Running


class Disagreement(Exception):
    """An observation fits no possible world."""


def page_of_source(page: int, number: int) -> Content:
    """The content of a page in the source of a range."""
    return (b"source %09d" % (page + 1000 * number), bytes([65 + (page + number) % 26]))


def head_of(number: int) -> bytes:
    return b"write %010d" % number


class Run:
    """One run of a program."""

    def __init__(self, program: Program, stack: contextlib.ExitStack) -> None:
        setting = self.setting = program.setting
        self.stack = stack
        self.mode = RegisterMode(setting.mode)
        memory = stack.enter_context(contextlib.closing(memory_of(setting.memory)))
        self.size = memory.page_size
        self.count = HUGE_PAGES if memory.is_hugetlb else SMALL_PAGES
        self.region = memory.pages(self.count)
        self.addresses = [self.region.start + page * self.size for page in range(self.count)]
        events = Feature(setting.events)
        self.rules = Rules(
            has_file=not memory.is_anon,
            private=not memory.shared,
            huge=memory.is_hugetlb,
            missing=bool(self.mode & MISSING),
            minor=bool(self.mode & MINOR),
            wp=bool(self.mode & WP),
            writes_cache=self.mode & MINOR and not self.mode & MISSING and setting.source != "none",  # type: ignore[arg-type]
            has_source=setting.source not in ("zero", "none"),
            removes=bool(events & Feature.EVENT_REMOVE),
            forks=bool(events & Feature.EVENT_FORK),
            unpopulated=setting.unpopulated,
        )
        if self.rules.writes_cache:
            # Holes in the file cause missing faults too.
            self.rules = Rules(**{**self.rules.__dict__, "missing": True})
        features = events | WP_FEATURES | MINORS
        if setting.unpopulated:
            features |= Feature.WP_UNPOPULATED
        if setting.driver == "inline":
            features |= Feature.SIGBUS
        self.alias = None
        if not memory.is_anon:
            assert self.region.fd is not None
            self.alias = stack.enter_context(Region.file(self.region.fd))
        # The range of each page, as a number.
        self.ranges = [0] * self.count
        self.first_of: dict[int, int] = {}  # the first page of each range, as it was served
        self.served_before = 0
        self.worlds = [{World("none", False, None, None, A)} for _ in range(self.count)]
        if self.alias is not None:
            for page in setting.before:
                self.write_file(page, 10_000 + page)
        self.sink = os.memfd_create(SINK)
        stack.callback(os.close, self.sink)
        self.saved = bytearray(self.region.length) if setting.preserve else None
        self.instant: list[set[Content] | None] = [None] * self.count
        # Written by this process, and not yet reported by a checkpoint or writeprotect().
        self.written = [False] * self.count
        self.uffd = stack.enter_context(Userfaultfd(features=features))
        self.prefetches = self.has_faulted = False
        self.handler: Handler
        self.serve()

    def source(self, page: int) -> Content:
        return page_of_source(page, self.ranges[page]) if self.rules.has_source else ZERO

    def parts(self, first: int, end: int) -> Iterator[tuple[range, Region]]:
        """Yield the runs of pages that belong to one range, each as a region."""
        at = first
        for _, run in itertools.groupby(self.ranges[first:end]):
            past = at + len(list(run))
            yield range(at, past), self.region[at * self.size : past * self.size]
            at = past

    def joined(self, call: Callable[[Region], bytes], first: int, end: int) -> bytes:
        return b"".join(call(part) for _, part in self.parts(first, end))

    def make_source(self, first: int, end: int) -> PageSource | None:
        kind = self.setting.source
        if kind == "none":
            return None
        if kind == "zero":
            return ZeroSource()
        data = b"".join(
            head + body * (self.size - HEAD) for head, body in map(self.source, range(first, end))
        )
        if kind == "buffer":
            return BufferSource(data)
        if kind == "file":
            fd = os.memfd_create("source")
            self.stack.callback(os.close, fd)
            os.truncate(fd, len(data))
            os.pwrite(fd, data, 0)
            return self.stack.enter_context(FileSource(fd))
        return CallableSource(Pages(self.size, first, self.ranges[first]))

    def serve(self) -> None:
        options: dict[str, Any] = {"prefetch": self.setting.prefetch * self.size}
        self.handler = Handler(self.uffd, driver=self.setting.driver, **options)  # type: ignore[arg-type]
        self.serve_part(0, self.count)
        self.handler.start()
        self.change(range(self.count), self.rules.serve)

    def serve_part(self, first: int, end: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.handler.serve(
                self.region[first * self.size : end * self.size],
                self.make_source(first, end),
                mode=self.mode,
                preserve=self.saved,
                present="keep",
            )
        self.first_of[self.ranges[first]] = first
        self.written[first:end] = [False] * (end - first)

    # Worlds

    def change(self, pages: Iterable[int], how: Callable[[World], Any]) -> None:
        """Change the worlds of pages; `how` returns the world that follows, or several worlds."""
        for page in pages:
            after: set[World] = set()
            for world in self.worlds[page]:
                result = how(world)
                after |= {result} if isinstance(result, World) else set(result)
            self.worlds[page] = after

    def let_pass(self) -> None:
        """Add the worlds that may have followed meanwhile."""
        for page in range(self.count):
            source = self.source(page)
            self.change(
                [page],
                lambda w, source=source: self.rules.by_itself(  # type: ignore[misc]
                    w, source, prefetches=self.prefetches, has_faulted=self.has_faulted
                ),
            )

    def keep(self, page: int, what: str, seen: object, after: dict[World, object]) -> None:
        """Keep the worlds that predict what was seen."""
        left = {world for world, predicted in after.items() if predicted == seen}
        if not left:
            self.disagree(page, what, seen, set(after.values()))
        self.worlds[page] = left

    def disagree(self, page: int, what: str, seen: object, possible: set[Any]) -> None:
        raise Disagreement(
            f"{what} of page {page}: {seen!r}, possible: {sorted(map(str, possible))};"
            f" it was one of {self.worlds[page]}"
        )

    # Steps

    def step(self, step: Step) -> None:
        self.let_pass()
        getattr(self, f"do_{step[0]}")(*step[1:])
        self.let_pass()

    def access(self, how: str, function: Callable[[], Any]) -> Any:
        """Call a function here or in a thread."""
        if how != "thread":
            return function()
        result: list[Any] = []

        def run() -> None:
            try:
                result.append(function())
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def observe(self, page: int, how: str) -> Content | str:
        at = self.addresses[page]
        if how == "kernel" and self.setting.driver != "inline":
            return self.by_kernel(at)
        try:
            head = _memory.read(at, HEAD)
            rest = _memory.read(at + HEAD, self.size - HEAD)
        except PagePoisonedError:
            return LOST
        if rest != rest[:1] * len(rest):
            raise Disagreement(f"page {page} is torn: {head!r} {sorted(set(rest))}")
        return (head, rest[:1])

    def by_kernel(self, at: int) -> Content | str:
        libc = ctypes.CDLL(None)
        written = libc.pwrite(
            self.sink, ctypes.c_void_p(at), ctypes.c_size_t(self.size), ctypes.c_long(0)
        )
        if written < 0:
            return LOST
        data = os.pread(self.sink, self.size, 0)
        if data[HEAD:] != data[HEAD : HEAD + 1] * (self.size - HEAD):
            raise Disagreement("a page is torn")
        return (data[:HEAD], data[HEAD : HEAD + 1])

    def faulted(self) -> None:
        self.has_faulted = True
        self.prefetches = self.prefetches or self.setting.prefetch > 0

    def do_read(self, page: int, how: str, _: int) -> None:
        source = self.source(page)
        seen = self.access(how, lambda: self.observe(page, how))
        self.faulted()
        after = {self.rules.read(world, source) for world in self.worlds[page]}
        self.keep(page, "a read", seen, {world: self.rules.found(world) for world in after})

    def do_write(self, page: int, how: str, number: int) -> None:
        source, head = self.source(page), head_of(number)

        def write() -> object:
            try:
                _memory.write(self.addresses[page], head)
            except PagePoisonedError:
                return True
            return False

        seen = self.access(how, write)
        self.faulted()
        after = {self.rules.write(world, source, head) for world in self.worlds[page]}
        self.keep(page, "a write's loss", seen, {w: self.rules.found(w) == LOST for w in after})
        # If Linux has filled a page, only the page table tells, and only while the page is in it.
        is_known = all(world.engine is not A for world in self.worlds[page])
        self.written[page] |= seen is False and is_known

    def write_file(self, page: int, number: int) -> None:
        assert self.alias is not None
        head = head_of(number)
        self.alias.write(page * self.size, head)
        self.change([page], lambda world: _written(world, head))

    def do_file(self, page: int, _: str, number: int) -> None:
        if self.alias is not None and self.saved is None:
            self.write_file(page, number)

    def do_populate(self, first: int, end: int) -> None:
        if self.mode == WP:
            return
        for _, part in self.parts(first, end):
            self.handler.populate(part)
        for page in range(first, end):
            source = self.source(page)
            self.change([page], lambda w, source=source: self.rules.fill(w, source))  # type: ignore[misc]

    def do_fill(self, first: int, end: int, number: int) -> None:
        if self.mode == WP:
            return
        pages = range(first, end)
        pushed = {page: (head_of(1000 * number + page), b"p") for page in pages}
        for run, part in self.parts(first, end):
            bytes_of = (head + body * (self.size - HEAD) for head, body in map(pushed.get, run))  # type: ignore[misc]
            self.handler.fill(part, 0, b"".join(bytes_of))
        for page in pages:
            self.change([page], lambda w, data=pushed[page]: self.rules.push(w, data))  # type: ignore[misc]

    def do_evict(self, first: int, end: int) -> None:
        may = self.mode & MISSING and self.setting.driver != "process"
        if not may:
            return
        for run, part in self.parts(first, end):
            refused = self.setting.memory.endswith("private") and self.file_has(run)
            handed: dict[int, Content] = {}
            write_back = self.keeper(run, handed) if self.mode & WP and end % 2 else None
            try:
                evicted = self.handler.evict(part, write_back=write_back)
            except ValueError:
                if not refused:
                    raise
                continue
            if refused or evicted % self.size or evicted > len(run) * self.size:
                raise Disagreement(f"evict returned {evicted:#x} for {len(run)} pages")
            if write_back is None:
                self.change(run, self.rules.evict)
                continue
            self.faulted()  # it reads the pages
            self.let_pass()
            for page, content in handed.items():
                after = {w: self.rules.found(self.rules.read(w, ZERO)) for w in self.worlds[page]}
                self.keep(page, "what is handed over", content, after)  # type: ignore[arg-type]
            self.change(run, self.rules.evict_written_back)

    def keeper(self, run: range, handed: dict[int, Content]) -> Callable[[int, memoryview], None]:
        """Return a write_back that records what it gets; the source does not change."""

        def keep(offset: int, data: memoryview) -> None:
            for at in range(0, len(data), self.size):
                content = bytes(data[at : at + HEAD]), bytes(data[at + HEAD : at + HEAD + 1])
                handed[first + (offset + at) // self.size] = content

        first = self.first_of[self.ranges[run.start]]
        return keep

    def file_has(self, run: range) -> bool:
        """Whether a private mapping would show pages of the file instead of those of its source."""
        if self.alias is None or self.region.fd is None:
            return False
        if self.size > mmap.PAGESIZE:  # hugetlbfs does not tell which pages a file has
            return os.fstat(self.region.fd).st_blocks > 0
        fd = os.open(f"/proc/self/fd/{self.region.fd}", os.O_RDONLY)
        try:
            return os.lseek(fd, run.start * self.size, os.SEEK_DATA) < run.stop * self.size
        except OSError:  # there is no data after this offset
            return False
        finally:
            os.close(fd)

    def do_states(self, first: int, end: int) -> None:
        found = self.joined(self.handler.page_states, first, end)
        for page, state in zip(range(first, end), map(PageState, found), strict=True):
            if state is PageState.IN_FLIGHT and self.prefetches:
                continue
            possible = {w: self.rules.reported(w) for w in self.worlds[page]}
            left = {world for world, states in possible.items() if state in states}
            if not left:
                self.disagree(page, "the state", state, set().union(*possible.values()))
            self.worlds[page] = left

    def do_wp(self, first: int, end: int) -> None:
        if not self.mode & WP:
            return
        if self.mode == WP and not self.rules.unpopulated and not self.rules.has_file:
            self.change(range(first, end), lambda w: self.rules.read(w, ZERO))  # it maps holes
        before = [self.worlds[page] for page in range(self.count)]
        told = set[int]()
        if first % 2:
            why, found = "states", self.joined(self.handler.writeprotect, first, end)
        else:
            why = "checkpoint"
            found = b"".join(
                self.checkpoint(run, part, told) for run, part in self.parts(first, end)
            )
        for page, state in zip(range(first, end), map(PageState, found), strict=True):
            self.take(page, state, why, is_told=page in told)
            possible = [one for w in self.worlds[page] for one in self.rules.protect(w, why)]
            # A worker wakes the reader of a page before it stores the page's state.
            may_be_at_it = self.prefetches or self.setting.source == "python"
            if state is PageState.IN_FLIGHT and may_be_at_it:
                self.worlds[page] = {w for _, _, w in possible}
                continue
            left = {
                world
                for seen, reported, world in possible
                if seen is state and (why == "states" or reported == (page in told))
            }
            if not left:
                what = (state, page in told)
                self.disagree(page, why, what, {(seen, told) for seen, told, _ in possible})
            self.worlds[page] = left
            if self.saved is None:
                continue
            self.instant[page] = {
                self.rules.read(w, ZERO).content if w.pte != "poison" else ZERO
                for w in before[page]
            }

    def take(self, page: int, state: PageState, why: str, *, is_told: bool) -> None:
        """Check that a write is reported by a checkpoint or an earlier writeprotect()."""
        if why == "checkpoint" and self.written[page] and not is_told:
            raise Disagreement(f"the checkpoint does not report page {page}, which was written")
        if why == "checkpoint" or state not in UNWRITTEN:
            self.written[page] = False

    def checkpoint(self, run: range, part: Region, told: set[int]) -> bytes:
        """Return the states; check that the ranges are the pages whose states say written."""
        taken = self.handler.checkpoint(part)
        ranges = {
            page: written.state
            for written in taken.written
            for page in range(written.start // self.size, written.end // self.size)
        }
        states = dict(enumerate(map(PageState, taken.states)))
        expected = {
            page: state
            for page, state in states.items()
            if state not in UNWRITTEN or page in ranges
        }
        if ranges != expected:
            raise Disagreement(f"checkpoint: ranges {ranges}, states {expected}")
        told.update(run.start + page for page in ranges)
        return taken.states

    def do_unprotect(self, first: int, end: int) -> None:
        if not self.mode & WP or self.saved is not None:
            return
        found = self.joined(self.handler.unprotect, first, end)
        for page, state in zip(range(first, end), map(PageState, found), strict=True):
            possible = [pair for w in self.worlds[page] for pair in self.rules.unprotect(w)]
            if state is PageState.IN_FLIGHT and (
                self.prefetches or self.setting.source == "python"
            ):
                self.worlds[page] = {w for _, w in possible}
                continue
            left = {world for seen, world in possible if seen is state}
            if not left:
                self.disagree(page, "unprotect", state, {seen for seen, _ in possible})
            self.worlds[page] = left

    def do_preserve(self, unprotect: bool) -> None:
        if self.saved is None or all(one is None for one in self.instant):
            return
        self.handler.preserve(self.region, keep_protected=not unprotect)
        self.change(range(self.count), lambda w: self.rules.save(w, unprotect=unprotect))
        for page, instant in enumerate(self.instant):
            if instant is None:
                continue
            at = page * self.size
            got = bytes(self.saved[at : at + HEAD]), bytes(self.saved[at + HEAD : at + HEAD + 1])
            if got not in instant:
                self.disagree(page, "what was preserved", got, instant)

    def advise(self, pages: range, advice: int) -> bool:
        """Call madvise(2) page by page, as pages may be apart; return whether it succeeded."""
        for page in pages:
            try:
                _memory.madvise(self.addresses[page], self.size, advice)
            except UffdOSError:
                return False
        return True

    @property
    def may_drop(self) -> bool:
        # A page that is dropped while it is being preserved is lost, and stop() raises an error.
        return self.saved is None

    def do_dontneed(self, first: int, end: int) -> None:
        if self.may_drop and self.advise(range(first, end), mmap.MADV_DONTNEED):
            self.change(range(first, end), self.rules.dontneed)

    def do_remove(self, first: int, end: int) -> None:
        if self.may_drop and self.alias is not None and not self.rules.private:
            assert self.advise(range(first, end), MADV_REMOVE)
            self.change(range(first, end), lambda w: self.rules.punch(w, by_madvise=True))

    def do_punch(self, first: int, end: int) -> None:
        if self.may_drop and self.alias is not None:
            self.alias.punch_hole(first * self.size, (end - first) * self.size)
            self.change(range(first, end), lambda w: self.rules.punch(w, by_madvise=False))

    def do_free(self, first: int, end: int) -> None:
        if self.may_drop and not self.rules.has_file:
            assert self.advise(range(first, end), MADV_FREE)
            self.change(range(first, end), self.rules.free)

    def do_pageout(self, first: int, end: int) -> None:
        if not self.rules.huge and self.advise(range(first, end), MADV_PAGEOUT):
            self.change(range(first, end), self.rules.reclaim)

    def do_fork(self, does: list[Step]) -> None:
        if self.saved is not None and self.rules.has_file:
            does = [one for one in does if one[0] == "read"]  # its writes would not be seen
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            try:
                for name, page, number in does:
                    seen: object = None
                    if name == "read":
                        seen = self.observe(page, "here")
                    else:
                        try:
                            _memory.write(self.addresses[page], head_of(number))
                        except PagePoisonedError:
                            seen = LOST
                    os.write(writing, repr(seen).encode() + b"\n")
            except BaseException as error:
                os.write(writing, repr(f"in a fork: {error!r}").encode() + b"\n")
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answers = [line.decode().strip() for line in pipe]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status or len(answers) != len(does):
            raise Disagreement(f"a fork ended with {status} after {answers}")
        self.faulted()
        self.let_pass()
        # The page in the parent, and in the fork.
        pairs = {
            page: {(w, c) for w in self.worlds[page] for c in self.rules.child(w)}
            for page in {page for _, page, _ in does}
        }
        for (name, page, number), answer in zip(does, answers, strict=True):
            source, after = self.source(page), set()
            for w, c in pairs[page]:
                for now in self.rules.by_itself(
                    c, source, prefetches=self.prefetches, has_faulted=True
                ):
                    head = head_of(number) if name == "write" else None
                    new = self.rules.in_child(now, source, head)
                    found = self.rules.found(new)
                    if name == "write":
                        found = LOST if found == LOST else None  # type: ignore[assignment]
                    if repr(found) == answer:
                        after.add((self.rules.after_child(w, new), new))
            if not after:
                self.disagree(page, f"a fork's {name}", answer, {str(c) for _, c in pairs[page]})
            pairs[page] = after
        for page, left in pairs.items():
            self.worlds[page] = {w for w, _ in left}

    def do_move(self, first: int, end: int) -> None:
        needed = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
        if self.rules.huge or self.setting.events & int(needed) != int(needed):
            return
        start = self.addresses[first]
        if self.addresses[first:end] != [start + i * self.size for i in range(end - first)]:
            return
        length = (end - first) * self.size
        to = _memory.mmap(length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            _memory.mremap(start, length, length, MAYMOVE | FIXED, to)
        except UffdOSError:
            return  # several mappings: mremap moves one at a time
        for page in range(first, end):
            self.addresses[page] += to - start

    def do_split(self, first: int, _: int) -> None:
        at = self.addresses[first]
        _memory.mprotect(at, self.size, mmap.PROT_READ)
        _memory.mprotect(at, self.size, mmap.PROT_READ | mmap.PROT_WRITE)

    def do_restart(self, *_: int) -> None:
        # The page table does not show the poison of a huge page, on which the driver gets SIGBUS.
        unclear = self.rules.huge and self.setting.driver == "inline"
        if self.moved or not self.may_drop or unclear:
            return
        self.handler.stop()
        self.prefetches = False
        self.change(range(self.count), self.rules.stop)
        self.ranges = [0] * self.count
        self.serve()

    def do_swap(self, first: int, end: int) -> None:
        """Serve a part from another source."""
        pages = range(first, end)
        is_moved = any(self.addresses[at] != self.region.start + at * self.size for at in pages)
        # See do_restart.
        if is_moved or not self.may_drop or (self.rules.huge and self.setting.driver == "inline"):
            return
        self.handler.unserve(self.region, first * self.size, (end - first) * self.size)
        self.let_pass()
        self.change(pages, self.rules.stop)
        self.served_before += 1
        self.ranges[first:end] = [self.served_before] * len(pages)
        self.serve_part(first, end)
        self.change(pages, self.rules.serve)

    def do_kill(self, *_: int) -> None:
        engine = self.handler._engine
        if not isinstance(engine, RemoteEngine):
            return
        before = self.handler.stats().restarts
        if before < 2:
            kill(engine.pids()[1], number=signal.SIGKILL)
            while self.handler.stats().restarts == before:
                os.sched_yield()

    @property
    def moved(self) -> bool:
        return any(
            at != self.region.start + page * self.size for page, at in enumerate(self.addresses)
        )

    def end(self) -> None:
        """Check every page again, and stop."""
        self.let_pass()
        self.do_states(0, self.count)
        for page in range(self.count):
            self.let_pass()
            self.do_read(page, "here", 0)
        self.let_pass()
        self.do_states(0, self.count)
        self.handler.stop()
        stats = self.handler.stats()
        if stats.failed or stats.unserved:
            raise Disagreement(f"failed {stats.failed}, unserved {stats.unserved}")


class Pages:
    """A source in Python, in this or another process."""

    def __init__(self, size: int, first: int, number: int) -> None:
        self.size, self.first, self.number = size, first, number

    def __call__(self, offset: int, length: int) -> bytes:
        """Return the requested pages."""
        first = self.first + offset // self.size
        pages = (
            page_of_source(page, self.number) for page in range(first, first + length // self.size)
        )
        return b"".join(head + body * (self.size - HEAD) for head, body in pages)


def _written(world: World, head: bytes) -> World:
    return world._replace(cache=(head, (world.cache or ZERO)[1]))


def run(program: Program) -> str:
    """Run a program; return what went wrong, or ""."""
    at = "at the start"
    try:
        with contextlib.ExitStack() as stack:
            run = Run(program, stack)
            try:
                for step in program.steps:
                    at = str(step)
                    run.step(step)
                at = "at the end"
                run.end()
            finally:
                with contextlib.suppress(Exception):
                    run.handler.stop()
                for page, address in enumerate(run.addresses):
                    if address != run.region.start + page * run.size:
                        _memory.munmap(address, run.size)
    except Disagreement as error:
        return f"{at}: {error}"
    except Exception:
        return f"{at}: {traceback.format_exc()}"
    return ""


def _wait_for_other_threads() -> None:
    """Wait until they sleep: if one is in AddressSanitizer's malloc(), it hangs in a fork."""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        stats = of_threads("self", "stat")
        del stats[threading.get_native_id()]
        if all(stat.rpartition(") ")[2][0] == "S" for stat in stats.values()):
            return
        time.sleep(0.01)


def attempt(program: Program) -> str:
    """Run a program in a fork; return what went wrong, including a crash or hang."""
    _wait_for_other_threads()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            faulthandler.enable(writing)
            os.write(writing, run(program).encode())
        finally:
            os._exit(0)
    os.close(writing)
    pidfd = os.pidfd_open(pid)
    for number in (signal.SIGABRT, signal.SIGKILL):  # the first prints its threads
        if select.select([pidfd], [], [], LIMIT_S * SCALE)[0]:
            break
        os.kill(pid, number)
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its forks may wait for a page
    with open(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return said + (f"\nit ended with {status}" if status else "")


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """Return spans of a list, large ones first."""
    size = length
    while size:
        size = size // 2
        for at in range(0, length, max(size, 1)):
            yield at, at + max(size, 1)
        if size == 1:
            return


def shorten(
    program: Program, fails: Callable[[Program], str], limit_s: float = 60.0
) -> tuple[Program | None, str]:
    """Drop steps while the program still fails; return the shortest one and its failure."""
    give_up = time.monotonic() + limit_s
    found: Program | None = None
    why = fails(program)
    changed = bool(why)
    while changed:
        changed, found = False, program
        for first, end in pieces(len(program.steps)):
            if time.monotonic() > give_up:
                return found, why
            kept = program.steps[:first] + program.steps[end:]
            shorter = Program(program.seed, program.setting, kept)
            if len(kept) < len(program.steps) and (failed := fails(shorter)):
                program, why, changed = shorter, failed, True
                break
    return found, why
