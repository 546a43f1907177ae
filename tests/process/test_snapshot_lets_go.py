"""Nothing of a target stays protected, whatever it mapped meanwhile, and whoever ends a "cow".

The process that takes the snapshot is stopped by a signal, or fails while a fork of it has all of
its descriptors.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pyuffd.testing._run import SCALE
from tests._child import crowd, limit_s
from tests.process._attach import status, wait_until
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
PAGES = 512  # more than the sweep saves in its first step
LIMIT_S = 0.2 * SCALE
LONG_S = 60 * SCALE
# What a target that is let go waits at most: for the limit, and for its CPU.
WAIT_S = LIMIT_S + 5 * SCALE

# Maps something over pages of an area, and writes all pages that are left.
TARGET = """
import ctypes, mmap, os, sys, tempfile, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
pages, PAGE, FIXED = int(sys.argv[1]), 4096, 0x10
area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
for page in range(pages):
    area[page * PAGE] = 1
file = tempfile.TemporaryFile()
file.truncate(pages * PAGE)
memfd = os.memfd_create("target")
os.truncate(memfd, pages * PAGE)
FLAGS = {"private file": (2, file.fileno()), "shared file": (1, file.fileno()),
         "private memfd": (2, memfd), "shared memfd": (1, memfd), "anonymous": (0x22, -1)}
left = set(range(pages))

def check(result):
    assert result != ctypes.c_void_p(-1).value, ctypes.get_errno()
    return result

def over(what, first, past):
    start, length = at + first * PAGE, (past - first) * PAGE
    left.difference_update(range(first, past))
    if what == "hole":
        assert not libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(length))
    elif what == "moved":
        check(libc.mremap(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_size_t(length),
                          1))
    elif what != "nothing":
        flags, fd = FLAGS[what]
        check(libc.mmap(ctypes.c_void_p(start), ctypes.c_size_t(length), 3, flags | FIXED, fd,
                        ctypes.c_long(0)))

print(at, flush=True)
for line in sys.stdin:
    if line.startswith("move "):
        page, here, there = ctypes.c_size_t(PAGE), at, at + 8 * PAGE
        assert not libc.munmap(ctypes.c_void_p(there), page)
        for _ in range(int(line.split()[1])):
            check(libc.mremap(ctypes.c_void_p(here), page, page, 3, ctypes.c_void_p(there)))
            here, there = there, here
    elif line == "race\\n":
        at_pages = [*range(pages - 20, 100, -17), pages - 2]
        writers = [threading.Thread(target=ctypes.memset, args=(at + page * PAGE, 2, 1))
                   for page in at_pages]
        for writer in writers:
            writer.start()
        print(writer.native_id, flush=True)
        over(sys.stdin.readline().strip(), pages - 4, pages)
        for writer in writers:
            writer.join()
    elif line == "write\\n":
        for page in sorted(left):
            ctypes.memset(at + page * PAGE, 2, 1)
    else:
        what = line.strip()
        over(what, 8, 12)
        over(what, pages - 2, pages)
    print("done", flush=True)
"""

# Takes a snapshot, of which the sweep does one step unless it may go on quickly; "fork" fails it
# beside a fork.
TAKER = """
import os, sys
from types import SimpleNamespace
from pyuffd import Process, Snapshot, SnapshotError
from pyuffd.snapshot import _capture

def at(name):
    if name != "resumed":
        return
    print("resumed", flush=True)
    if sys.stdin.readline() == "fork\\n":
        if not os.fork():
            sys.stdin.read()
            os._exit(0)
        raise KeyError

_capture.barrier = at
pid, start, length, path, limit_s, *quickly = sys.argv[1:]
area = SimpleNamespace(start=int(start), length=int(length))
with Process(int(pid)) as process:
    try:
        Snapshot.take(process, path, method="cow", ranges=[area],
                      rate=None if quickly else 1, max_stall_s=float(limit_s), durable=False)
        print("taken", flush=True)
    except SnapshotError as error:
        print(error.reason, flush=True)
    except KeyError:
        print("failed", flush=True)
"""


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def tell(popen: subprocess.Popen[str], word: str) -> None:
    assert popen.stdin is not None
    popen.stdin.write(word + "\n")
    popen.stdin.flush()


def answer(popen: subprocess.Popen[str], limit_s: float) -> str:
    assert popen.stdout is not None
    ready, _, _ = select.select([popen.stdout], [], [], limit_s)
    return popen.stdout.readline().strip() if ready else "nothing"


MAPPED = [
    "nothing",
    "private file",
    "shared file",
    "private memfd",
    "shared memfd",
    "anonymous",
    "hole",
    "moved",
]
# Who writes there meanwhile gets a SIGSEGV; without a change nobody waits.
UNREADABLE = ("nothing", "hole", "moved")


@pytest.mark.parametrize("ends", ["guard", "close"])
@pytest.mark.parametrize("what", MAPPED)
def test_writers_are_let_go(what: str, ends: str, tmp_path: Path) -> None:
    with running(TARGET, PAGES) as target:
        start = answer(target, limit_s(10))
        with running(TAKER, target.pid, start, PAGES * 4096, tmp_path / "image", LIMIT_S) as taker:
            assert answer(taker, limit_s(20)) == "resumed"
            tell(target, what)
            assert answer(target, limit_s(10)) == "done"
            if ends == "guard":
                taker.send_signal(signal.SIGSTOP)
                while psutil.Process(taker.pid).status() != psutil.STATUS_STOPPED:
                    time.sleep(0.001)
            else:
                tell(taker, "fork")
                assert answer(taker, limit_s(10)) == "failed"
            tell(target, "write")
            assert answer(target, WAIT_S) == "done"
            if ends == "guard":
                taker.send_signal(signal.SIGCONT)
                tell(taker, "go on")
                assert answer(taker, limit_s(20)) == "stalled"
    assert list(tmp_path.iterdir()) == []


def waits_in(tid: int) -> str:
    """The number of the system call in which a thread waits; "-1": in a page fault."""
    return Path(f"/proc/{tid}/syscall").read_text().split()[0]


@pytest.mark.parametrize("what", [what for what in MAPPED if what not in UNREADABLE])
def test_a_writer_whose_page_is_mapped_over(what: str, tmp_path: Path) -> None:
    """It goes on with the snapshot, although the page that it waits for is not protected now."""
    with running(TARGET, PAGES) as target:
        start = answer(target, limit_s(10))
        with running(TAKER, target.pid, start, PAGES * 4096, tmp_path / "image", LONG_S) as taker:
            assert answer(taker, limit_s(20)) == "resumed"
            taker.send_signal(signal.SIGSTOP)
            wait_until("it is stopped", lambda: status(taker.pid)["State"][0] == "T")
            tell(target, "race")
            writer = int(answer(target, limit_s(10)))
            wait_until("it waits for its page", lambda: waits_in(writer) == "-1")
            tell(target, what)
            wait_until("it waits", lambda: status(target.pid)["State"][0] == "D")
            taker.send_signal(signal.SIGCONT)
            assert answer(target, limit_s(10)) == "done"


def test_a_target_that_moves_its_memory_all_the_time(tmp_path: Path) -> None:
    """A snapshot goes on, however often: nothing is noted of a move that is over."""
    moves = 70_000
    with running(TARGET, PAGES) as target:
        start = answer(target, limit_s(10))
        with running(
            *(TAKER, target.pid, start, PAGES * 4096),
            *(tmp_path / "image", LIMIT_S * crowd(), "quickly"),
        ) as taker:
            assert answer(taker, limit_s(20)) == "resumed"
            tell(target, f"move {moves}")
            assert answer(target, limit_s(60)) == "done"
            tell(taker, "go on")
            assert answer(taker, limit_s(20)) == "taken"
