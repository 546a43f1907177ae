"""A process that changes its memory in every way, tracked from outside and compared by bytes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator

from pyuffd import BlindReason, DirtyRound, DirtyTracker, MappingKind, PageRanges, Process
from pyuffd.dirty import Grown, Mapped, Moved, Unmapped
from pyuffd.testing._run import SCALE

PAGE = 4096
# Does random things to its memory; each line of its input says how many.
PROGRAM = """
import ctypes, mmap, os, random, sys, threading
libc = ctypes.CDLL(None)
for name in ("malloc", "mmap", "mremap", "sbrk"):
    getattr(libc, name).restype = ctypes.c_void_p
W = ctypes.c_size_t
P, ANON, RW = 4096, 0x22, 3
chance = random.Random(int(sys.argv[1]))
areas, blocks, threads = [], [], []
libc_path = next(line.split()[-1] for line in open("/proc/self/maps") if "libc.so" in line)
file = open(libc_path, "rb")

def call(name, *args):
    result = getattr(libc, name)(*map(W, args))
    return None if result in (-1, None, 2**64 - 1) else result

def some():
    start, pages = chance.choice(areas)
    first = chance.randrange(pages)
    return start + first * P, chance.randint(1, min(8, pages - first))

def map_():
    pages = chance.choice([1, 16, 600])
    start = call("mmap", 0, pages * P, RW, ANON, 2**64 - 1, 0)
    areas.append((start, pages))

def map_file():
    start = call("mmap", 0, 8 * P, RW, 2, file.fileno(), chance.randrange(8) * P)
    areas.append((start, 8))

def unmap():
    if len(areas) > 3:
        start, pages = areas.pop(chance.randrange(len(areas)))
        call("munmap", start, pages * P)

def grow():
    index = chance.randrange(len(areas))
    start, pages = areas[index]
    moved = call("mremap", start, pages * P, (pages + 4) * P, 1)
    if moved:
        areas[index] = (moved, pages + 4)

def write():
    for _ in range(10):
        at, pages = some()
        ctypes.memmove(at + chance.randrange(P - 8), chance.randbytes(8), 8)

def drop(): at, pages = some(); call("madvise", at, pages * P, 4)
def drop_large():
    start, pages = chance.choice(areas)
    call("madvise", start, pages * P, 4)
def free(): at, pages = some(); call("madvise", at, pages * P, 8)
def huge(): at, pages = some(); call("madvise", at, pages * P, 14)
def lock(): at, pages = some(); call("mlock", at, pages * P); call("munlock", at, pages * P)
def protect():
    at, pages = some()
    call("mprotect", at, pages * P, chance.choice([0, 1]))
    call("mprotect", at, pages * P, RW)
def allocate():
    block = libc.malloc(W(chance.choice([100, 5000, 70000, 300000])))
    ctypes.memset(block, 7, 100)
    blocks.append(block)
def release():
    if blocks:
        libc.free(ctypes.c_void_p(blocks.pop(chance.randrange(len(blocks)))))
def break_(): libc.sbrk(W(3 * P))
def recurse(depth=None):
    depth = chance.choice([10, 200, 900]) if depth is None else depth
    # Through a C function each time, so that the thread's stack grows.
    return sorted([1], key=lambda _: recurse(depth - 1) if depth else 0)[0]
def thread():
    if len(threads) < 6:
        stop = threading.Event()
        threads.append(stop)
        threading.Thread(target=stop.wait, daemon=True).start()
def fork():
    at, _ = some()
    pid = os.fork()
    if not pid:
        ctypes.memmove(at, b"child", 5)
        os._exit(0)
    os.waitpid(pid, 0)

sys.setrecursionlimit(5000)
threading.stack_size(256 << 10)
map_(); map_(); map_()
names = [write] * 6 + [map_, map_file, unmap, grow, drop, drop_large, free, huge, lock, protect,
         allocate, allocate, release, break_, recurse, thread, fork]
print("ready", flush=True)
for line in sys.stdin:
    done = [chance.choice(names) for _ in range(int(line))]
    for step in done:
        step()
    print(*(step.__name__ for step in done), flush=True)
"""


class Image:
    """The pages of a process, updated only from rounds."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pages: dict[int, bytes] = {}
        for start, end in tracked(process):
            self.copy(start, end)

    def copy(self, start: int, end: int) -> None:
        for at, page in content(self.process, start, end):
            self.pages[at] = page

    def apply(self, round_: DirtyRound) -> None:
        for change in round_.layout:
            for at in range(change.start, change.end, PAGE):
                if isinstance(change, Unmapped):
                    self.pages.pop(at, None)
                elif isinstance(change, (Mapped, Grown, Moved)):
                    self.pages[at] = bytes(PAGE)
        for item in round_.dropped:
            for at in range(item.start, item.end, PAGE):
                self.pages[at] = bytes(PAGE)
        for ranges in (round_.written, round_.unsure):
            for item in ranges:
                self.copy(item.start, item.end)


def tracked(process: Process) -> Iterator[tuple[int, int]]:
    for mapping in process.mappings():
        if mapping.kind is not MappingKind.SPECIAL:
            yield mapping.start, mapping.end


def content(process: Process, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    packed = b"".join(number.to_bytes(8, "little") for number in (start, end, 0))
    buffer = bytearray(end - start)
    process.copy(PageRanges(memoryview(packed).cast("Q")), buffer)
    view = memoryview(buffer)
    for at in range(0, end - start, PAGE):
        yield start + at, bytes(view[at : at + PAGE])


def run(method: str, rounds: int, seed: int) -> list[int]:
    """Track the process; return how many pages were reported, and how many compared."""
    chance = random.Random(seed)
    reported = compared = 0
    target = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert target.stdin is not None
    assert target.stdout is not None
    assert target.stdout.readline() == "ready\n"
    with (
        Process(target.pid) as process,
        DirtyTracker(process, method=method) as tracker,  # type: ignore[arg-type]
    ):
        with process.stopped(10 * SCALE):
            tracker.collect().commit()
            image = Image(process)
        for number in range(rounds):
            print(chance.randint(1, 8), file=target.stdin, flush=True)
            done = target.stdout.readline().strip()
            assert done, "the target has ended"
            with process.stopped(10 * SCALE), tracker.collect() as round_:
                reported += round_.written.pages() + round_.dropped.pages()
                # The last one is compared in any case.
                if chance.random() < 0.2 and number + 1 < rounds:
                    continue
                image.apply(round_)
                round_.commit()
                where = f"seed {seed}, round {number}, after {done}"
                compared += compare(image, process, tracker, where)
    print("1", file=target.stdin, flush=True)
    assert target.stdout.readline(), "the target has ended"
    target.kill()
    target.communicate()
    return [reported, compared]


def compare(image: Image, process: Process, tracker: DirtyTracker, where: str) -> int:
    unseen = (BlindReason.SHARED, BlindReason.NOT_REGISTERED, BlindReason.BUSY)
    blind = [(b.start, b.end) for b in tracker.blind if b.reason in unseen]
    count = 0
    for start, end in tracked(process):
        for at, page in content(process, start, end):
            count += 1
            if image.pages.get(at) != page and not any(a <= at < b for a, b in blind):
                mapping = process.mappings().at(at)
                raise AssertionError(f"{where}: page {at:#x} of {mapping} went unseen")
    return count
