"""A program that changes memory in every way, and compares it with what a tracker reports.

test_dirty_oracle.py runs it in a child process. After each round the consumer's image, updated only
from the rounds, must equal the memory, except where the tracker reports that it is blind and the
memory was in fact changed behind its back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable

from pyuffd import BlindReason, DirtyRound, DirtyTracker, Region
from pyuffd.dirty import Grown, Mapped, Moved, Unmapped
from pyuffd.testing import MEMORY_TYPES
from pyuffd.testing._memory_types import HUGE_PAGE, MemoryType

SMALL_PAGES = 3 * HUGE_PAGE // 4096
HUGE_PAGES = 4
MADV_FREE, MADV_PAGEOUT = 8, 21
FALLOC_FL_PUNCH_HOLE = 3  # with KEEP_SIZE
MREMAP_MAYMOVE_FIXED = 3
MAP_FIXED = 0x10
PROT_NONE = 0  # not in the mmap module
ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap"):
    getattr(libc, _name).restype = ctypes.c_void_p
_WORDS = ctypes.c_size_t


def call(name: str, *args: int) -> int | None:
    """Call libc with addresses; None if it fails."""
    result = getattr(libc, name)(*map(_WORDS, args))
    return None if result in (-1, None, 2**64 - 1) else int(result)


class World:
    """The memory, the operations on it, and the pages that were changed behind the tracker."""

    def __init__(
        self, memory: MemoryType, region: Region, chance: random.Random, *, sees_drops: bool
    ) -> None:
        self.memory, self.region, self.chance = memory, region, chance
        self.page = memory.page_size
        self.sees_drops = sees_drops
        self.pages = region.length // self.page
        self.start = region.start
        self.mapped = [True] * self.pages
        self.other = [False] * self.pages  # private anonymous memory is mapped there now
        self.behind: set[int] = set()
        self.paged_out: set[int] = set()
        self.untouched = range(0)  # the last pages that were mapped and not touched
        self.mem = os.open("/proc/self/mem", os.O_RDONLY)

    def at(self, index: int) -> int:
        return self.start + index * self.page

    def some(self, most: int = 8) -> range:
        first = self.chance.randrange(self.pages)
        return range(first, min(self.pages, first + self.chance.randint(1, most)))

    def whole(self, pages: range) -> bool:
        return all(self.mapped[index] for index in pages)

    def is_file(self, index: int) -> bool:
        return self.region.fd is not None and not self.other[index]

    # Operations: each leaves the memory readable and writable.

    def write(self) -> None:
        for index in self.some():
            if self.mapped[index]:
                at = self.at(index) + self.chance.randrange(self.page - 8)
                data = self.chance.randbytes(8)
                ctypes.memmove(at, data, 8)
                if self.memory.shared and self.is_file(index):
                    self.behind.discard(index)

    def read_into(self) -> None:
        """A system call writes."""
        index = self.chance.randrange(self.pages)
        if self.mapped[index]:
            buffer = (ctypes.c_char * 16).from_address(self.at(index))
            with open("/dev/urandom", "rb", buffering=0) as source:
                source.readinto(buffer)

    def dontneed(self, most: int = 2) -> None:
        pages = self.some(most)
        if self.whole(pages):
            call("madvise", self.at(pages[0]), len(pages) * self.page, mmap.MADV_DONTNEED)
            self._dropped(pages)

    def dontneed_2mib(self) -> None:
        first = -(-self.start // HUGE_PAGE) * HUGE_PAGE
        index = (first - self.start) // self.page
        count = HUGE_PAGE // self.page
        if index + count <= self.pages and self.whole(range(index, index + count)):
            call("madvise", first, HUGE_PAGE, mmap.MADV_DONTNEED)
            self._dropped(range(index, index + count))

    def _dropped(self, pages: range) -> None:
        """Note pages to which the tracker is blind: huge pages, and private copies in swap."""
        mine = {index for index in pages if not self.other[index]}
        if self.memory.is_hugetlb:
            self.behind |= set() if self.sees_drops else mine
        elif self.memory.name == "shmem-private":
            self.behind |= mine & self.paged_out

    def free(self) -> None:
        pages = self.some(4)
        if self.whole(pages):
            call("madvise", self.at(pages[0]), len(pages) * self.page, MADV_FREE)

    def page_out(self) -> None:
        pages = self.some(32)
        if self.whole(pages):
            call("madvise", self.at(pages[0]), len(pages) * self.page, MADV_PAGEOUT)
            self.paged_out.update(pages)

    def punch(self) -> None:
        pages = self.some(3)
        if self.region.fd is not None:
            call(
                "fallocate",
                self.region.fd,
                FALLOC_FL_PUNCH_HOLE,
                pages[0] * self.page,
                len(pages) * self.page,
            )
            self.behind.update(index for index in pages if self.is_file(index))

    def remove(self) -> None:
        """Punch a hole through the mapping; only possible for shared memory."""
        pages = self.some(3)
        if self.whole(pages) and not (
            call("madvise", self.at(pages[0]), len(pages) * self.page, mmap.MADV_REMOVE) is None
            or self.sees_drops
        ):
            self.behind.update(index for index in pages if self.is_file(index))

    def truncate(self) -> None:
        if self.region.fd is not None:
            os.ftruncate(self.region.fd, (self.pages - 2) * self.page)
            os.ftruncate(self.region.fd, self.pages * self.page)
            self.behind.update(
                index for index in (self.pages - 2, self.pages - 1) if self.is_file(index)
            )

    def write_behind(self) -> None:
        """Write through the descriptor, which changes no page table."""
        index = self.chance.randrange(self.pages)
        if self.region.fd is not None and not self.memory.is_hugetlb:
            os.pwrite(self.region.fd, self.chance.randbytes(16), index * self.page)
            if self.is_file(index):
                self.behind.add(index)

    def fork(self) -> None:
        index = self.chance.randrange(self.pages)
        pid = os.fork()
        if not pid:
            if self.mapped[index]:
                ctypes.memmove(self.at(index), b"child", 5)
            os._exit(0)
        os.waitpid(pid, 0)
        if self.memory.shared and self.is_file(index):
            self.behind.add(index)

    def protect(self) -> None:
        pages = self.some(16)
        if self.whole(pages):
            for prot in (PROT_NONE, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                call("mprotect", self.at(pages[0]), len(pages) * self.page, prot)

    def lock(self) -> None:
        pages = self.some(4)
        if self.whole(pages):
            call("mlock", self.at(pages[0]), len(pages) * self.page)
            call("munlock", self.at(pages[0]), len(pages) * self.page)

    def collapse(self) -> None:
        call("madvise", self.start, self.region.length, mmap.MADV_HUGEPAGE)

    def unmap(self) -> None:
        pages = self.some(3)
        if call("munmap", self.at(pages[0]), len(pages) * self.page) is not None:
            self._set(pages, mapped=False, other=False)

    def map_over(self) -> None:
        """Map new memory at the same place: the kernel sends no event."""
        pages = self.some(3)
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        length = len(pages) * self.page
        if call("mmap", self.at(pages[0]), length, prot, ANON | MAP_FIXED, 2**64 - 1, 0):
            self._set(pages, mapped=True, other=True)
            ctypes.memmove(self.at(pages[0]), b"new", 3)

    def map_untouched(self) -> None:
        """Map memory between two gaps, so that it is a separate mapping."""
        pages = range(first := self.chance.randrange(1, self.pages - 4), first + 3)
        around = range(pages[0] - 1, pages[-1] + 2)
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        if call("munmap", self.at(around[0]), len(around) * self.page) is not None:
            self._set(around, mapped=False, other=False)
            length = len(pages) * self.page
            if call("mmap", self.at(pages[0]), length, prot, ANON | MAP_FIXED, 2**64 - 1, 0):
                self._set(pages, mapped=True, other=True)
                self.untouched = pages

    def move_inside(self) -> None:
        """Move memory inside the range.

        Memory that was never touched is merged with its new neighbours, and on Linux 6.18 the
        merged mapping loses its registration.
        """
        source, target = self.untouched or self.some(3), self.some(3)
        self.untouched = range(0)
        count = min(len(source), len(target))
        source, target = source[:count], target[:count]
        length = count * self.page
        if (
            self.whole(source)
            and not {*source} & {*target}
            and (self.region.fd is None or all(self.other[index] for index in source))
            and call(
                "mremap",
                self.at(source[0]),
                length,
                length,
                MREMAP_MAYMOVE_FIXED,
                self.at(target[0]),
            )
        ):
            self._set(source, mapped=False, other=False)
            self._set(target, mapped=True, other=True)

    def move_in(self) -> None:
        """Move memory with content into the range."""
        pages = self.some(3)
        length = len(pages) * self.page
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        source = call("mmap", 0, length, prot, ANON, 2**64 - 1, 0)
        assert source is not None
        ctypes.memmove(source, self.chance.randbytes(64), 64)
        if call("mremap", source, length, length, MREMAP_MAYMOVE_FIXED, self.at(pages[0])):
            self._set(pages, mapped=True, other=True)

    def move_out(self) -> None:
        pages = self.some(2)
        length = len(pages) * self.page
        target = call("mmap", 0, length, PROT_NONE, ANON, 2**64 - 1, 0)
        assert target is not None
        if self.whole(pages) and call(
            "mremap", self.at(pages[0]), length, length, MREMAP_MAYMOVE_FIXED, target
        ):
            self._set(pages, mapped=False, other=False)
        call("munmap", target, length)

    def _set(self, pages: range, *, mapped: bool, other: bool) -> None:
        for index in pages:
            self.mapped[index], self.other[index] = mapped, other
            self.behind.discard(index)

    def content(self, index: int) -> bytes:
        return os.pread(self.mem, self.page, self.at(index)) if self.mapped[index] else b""


SIMPLE = (
    *("write", "write", "write", "read_into", "dontneed", "dontneed_2mib", "free", "page_out"),
    *("punch", "remove", "truncate", "write_behind", "fork", "protect", "lock", "collapse"),
)
LAYOUT = (
    *("unmap", "map_over", "map_untouched", "map_untouched"),
    *("move_in", "move_out", "move_inside", "move_inside"),
)


class Image:
    """The image of a consumer, made only from rounds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pages = [world.content(index) for index in range(world.pages)]

    def _indices(self, start: int, end: int) -> range:
        world = self.world
        first = max(0, start - world.start) // world.page
        return range(first, min(world.pages, -(-(end - world.start) // world.page)))

    def apply(self, round_: DirtyRound) -> None:
        zero = bytes(self.world.page)
        for change in round_.layout:
            for index in self._indices(change.start, change.end):
                if isinstance(change, Unmapped):
                    self.pages[index] = b""
                elif isinstance(change, (Mapped, Grown, Moved)):
                    self.pages[index] = zero
        for ranges in (round_.dropped, round_.written, round_.unsure):
            for item in ranges:
                for index in self._indices(item.start, item.end):
                    fresh = self.world.content(index)
                    self.pages[index] = zero if ranges is round_.dropped and fresh else fresh


def check(world: World, image: Image, tracker: DirtyTracker, where: str) -> None:
    """Check that the image equals the memory, except pages changed behind the tracker's back."""
    different = [i for i in range(world.pages) if image.pages[i] != world.content(i)]
    unexplained = [i for i in different if i not in world.behind]
    assert not unexplained, f"{where}: pages {unexplained[:8]} of {len(unexplained)} went unseen"
    if different:
        reasons = (
            BlindReason.SHARED,
            BlindReason.FILE,
            BlindReason.FILE_HOLES,
            BlindReason.HUGE_DROPS,
        )
        blind = [b for b in tracker.blind if b.reason in reasons]
        for index in different:
            at = world.at(index)
            assert any(b.start <= at < b.end for b in blind), f"{where}: page {index} is not blind"
            image.pages[index] = world.content(index)
    world.behind.clear()


def run(name: str, method: str, watch_drops: bool, rounds: int, seed: int) -> int:
    """Run the program; return how many pages the rounds reported."""
    chance = random.Random(seed)
    memory = MEMORY_TYPES[name]
    pages = HUGE_PAGES if memory.is_hugetlb else SMALL_PAGES
    reported = 0
    operations = SIMPLE if memory.is_hugetlb else SIMPLE + LAYOUT
    with memory.make(pages * memory.page_size) as region:
        sees_drops = watch_drops or method == "wp-sync"
        world = World(memory, region, chance, sees_drops=sees_drops)
        for _ in range(20):
            world.write()
        world.behind.clear()
        with DirtyTracker(region, method=method, watch_drops=watch_drops) as tracker:  # type: ignore[arg-type]
            image = Image(world)
            for number in range(rounds):
                done = [chance.choice(operations) for _ in range(chance.randint(1, 6))]
                for operation in done:
                    step: Callable[[], None] = getattr(world, operation)
                    step()
                with tracker.collect() as round_:
                    reported += round_.written.pages() + round_.dropped.pages()
                    if chance.random() < 0.2:
                        continue  # as if saving it failed: the next round contains all of it
                    image.apply(round_)
                    round_.commit()
                check(world, image, tracker, f"seed {seed}, round {number}, after {done}")
        os.close(world.mem)
    return reported
