"""`DirtyTracker` over another process: everything it does to its memory is in a round or blind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from pyuffd import (
    BlindReason,
    DirtyTracker,
    Grown,
    Mapped,
    Process,
    ProcessGoneError,
    Region,
    Unmapped,
)
from pyuffd.remote import _pinned
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel.test_pinned_buffers import Ring, needs_io_uring
from tests.process._attach import status, wait_until
from tests.process._redis import redis
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
ORACLE = "tests.process._track_oracle:run"


def needs_program(name: str) -> pytest.MarkDecorator:
    """Skip where a program is not installed."""

    def missing() -> tuple[list[str], str]:
        return ([] if shutil.which(name) else [name]), f"{name} is not installed"

    return marked(Need(name, missing))


def seed() -> int:
    return int(os.environ.get("PYUFFD_SEED") or random.randrange(1 << 32))


@pytest.mark.parametrize(("method", "rounds"), [("wp-async", 8), ("wp-sync", 3)])
def test_nothing_goes_unseen(method: str, rounds: int) -> None:
    start = seed()
    reported, compared = run_child(ORACLE, method, rounds, start, budget_s=60).value
    assert reported > 0, f"PYUFFD_SEED={start}"
    assert reported < compared * 2, f"PYUFFD_SEED={start}"


@pytest.mark.stress
@pytest.mark.parametrize("method", ["wp-async", "wp-sync"])
def test_nothing_goes_unseen_in_many_rounds(method: str) -> None:
    for _ in range(10):
        run_child(ORACLE, method, 40, seed(), budget_s=600)


PROGRAM = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
W = ctypes.c_size_t
area = libc.mmap(W(0), W(64 * 4096), 3, 0x22, -1, W(0))
def touch(start, pages):
    for page in range(pages):
        ctypes.memset(start + page * 4096, 1, 8)
touch(area, 64)
print(area, flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    numbers = [int(n) for n in numbers]
    if word == "touch":
        result = touch(area + numbers[0] * 4096, numbers[1])
    elif word == "map":
        result = libc.mmap(W(0), W(numbers[0] * 4096), 3, 0x22, -1, W(0))
        touch(result, 1)
    elif word == "unmap":
        result = libc.munmap(W(area + numbers[0] * 4096), W(numbers[1] * 4096))
    elif word == "brk":
        result = libc.sbrk(W(numbers[0] * 4096))
        touch(result, numbers[0])
    print(result, flush=True)
"""


class Target:
    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid
        self.area = int(self._line())

    def _line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def tell(self, word: str, *numbers: int) -> int:
        assert self.popen.stdin is not None
        print(word, *numbers, file=self.popen.stdin, flush=True)
        answer = self._line()
        return int(answer) if answer not in ("None", "") else 0

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.end()


def test_layout(target: Target) -> None:
    """What is mapped comes under tracking by itself, what is unmapped leaves."""
    with Process(target.pid) as process, DirtyTracker(process) as tracker:
        assert tracker.method == "wp-async"
        tracker.collect().commit()
        new = target.tell("map", 50)
        target.tell("unmap", 10, 4)
        heap = target.tell("brk", 3)
        with tracker.collect() as round_:
            changes = round_.layout
            covered = [c for c in changes if isinstance(c, Mapped | Grown)]
            assert any(c.start <= new < c.end for c in covered)
            assert any(c.start <= heap < c.end for c in covered if isinstance(c, Grown))
            hole = target.area + 10 * PAGE
            gone = [c for c in changes if isinstance(c, Unmapped)]
            assert any((c.start, c.end) == (hole, hole + 4 * PAGE) for c in gone)
            written = [item for item in round_.written if item.start <= new < item.end]
            assert len(written) == 1
            round_.commit()
        target.tell("touch", 20, 1)
        with tracker.collect() as round_:
            page = target.area + 20 * PAGE
            assert any(item.start <= page < item.end for item in round_.written)
        assert tracker.rate > 0


@pytest.mark.parametrize("method", ["wp-async", "wp-sync"])
def test_holes_of_new_memory_are_not_written(
    target: Target, method: Literal["wp-async", "wp-sync"]
) -> None:
    """As in the 64 MiB that malloc reserves for a thread, of which few pages are used."""
    with Process(target.pid) as process, DirtyTracker(process, method=method) as tracker:
        tracker.collect().commit()
        new = target.tell("map", 16384)
        with tracker.collect() as round_:
            assert any(
                c.start <= new < c.end for c in round_.layout if isinstance(c, Mapped | Grown)
            )
            assert round_.written.bytes_in([(new, new + 16384 * PAGE)]) == [PAGE]
            assert (
                round_.dropped.bytes_in([(new, new + 16384 * PAGE)]) == [0] or method == "wp-async"
            )
            round_.commit()


def test_closing_leaves_the_target_alone(target: Target) -> None:
    with Process(target.pid) as process:
        with DirtyTracker(process):
            flags = process.mappings(details=True).at(target.area)
            assert flags is not None
            assert "uw" in flags.flags
        assert not [m for m in process.mappings(details=True) if "uw" in m.flags]
        target.tell("touch", 0, 64)


def test_a_killed_tracker_leaves_the_target_alone(target: Target) -> None:
    code = (
        "import sys, time\n"
        "from pyuffd import DirtyTracker, Process\n"
        f"p = Process({target.pid})\n"
        "t = DirtyTracker(p)\n"
        "print('tracks', flush=True)\n"
        "time.sleep(600)\n"
    )
    tracker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert tracker.stdout is not None
    assert tracker.stdout.readline() == b"tracks\n"
    tracker.kill()
    tracker.communicate()
    with Process(target.pid) as process:
        wait_until(
            "it is unregistered",
            lambda: not [m for m in process.mappings(details=True) if "uw" in m.flags],
        )
    target.tell("touch", 0, 64)
    assert status(target.pid)["State"][0] in "SR"


def test_blind_and_ranges(target: Target) -> None:
    with Process(target.pid) as process:
        area = process.mappings().at(target.area)
        assert area is not None
        with DirtyTracker(process) as tracker:
            reasons = {blind.reason for blind in tracker.blind}
            assert {BlindReason.SPECIAL, BlindReason.FILE} <= reasons
            for blind in tracker.blind:
                if blind.reason is BlindReason.NOT_REGISTERED:
                    refused = process.mappings().at(blind.start)
                    assert refused is not None
                    assert refused.permissions == "r--s", "by a descriptor that is read-only"
        with DirtyTracker(process, [area]) as tracker:
            assert tracker.blind == ()
            target.tell("touch", 3, 2)
            (written,) = tracker.collect().written
            assert (written.start, written.length) == (target.area + 3 * PAGE, 2 * PAGE)


def test_the_end_of_the_target_is_said(target: Target) -> None:
    with Process(target.pid) as process, DirtyTracker(process) as tracker:
        tracker.collect().commit()
        target.end()
        with pytest.raises(ProcessGoneError):
            tracker.collect()


def pinned() -> None:
    """A buffer that io_uring has pinned is unsure in every round, and blind as PINNED."""
    ring = Ring()
    with Region.anonymous(8 * PAGE) as region:
        region.fill(1)
        inner = Region.at(region.start + 2 * PAGE, 2 * PAGE)
        ring.pin(inner)
        with DirtyTracker(region) as tracker, open("/proc/self/exe", "rb") as file:
            for _ in range(2):
                with tracker.collect() as round_:
                    assert [(r.start, r.end) for r in round_.unsure] == [
                        (inner.start, inner.start + inner.length)
                    ]
                    round_.commit()
            assert ring.read(file.fileno(), inner.start, PAGE, fixed=True) == PAGE
            with tracker.collect() as round_:
                assert not round_.written, "the kernel does not report it"
                assert round_.unsure.pages() == 2
                round_.commit()
            (blind,) = [b for b in tracker.blind if b.reason is BlindReason.PINNED]
            assert (blind.start, blind.end) == (inner.start, inner.start + inner.length)
        ring.close()


@needs_io_uring()
def test_pinned_buffers_are_named() -> None:
    run_child(pinned)


@needs_program("redis-server")
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_redis(user: str) -> None:
    """As root and as another user, while it is busy: its answers are what they were."""
    with redis(user) as server:
        with Process(server.pid) as process:
            for number in range(10):
                with DirtyTracker(process) as tracker:
                    assert server.ask("SET", f"key{number}", "x" * 9000) == b"+OK\r\n"
                    with tracker.collect() as round_:
                        assert round_.written.bytes >= 8192
                        round_.commit()
        for number in range(10):
            assert b"x" * 9000 in server.ask("GET", f"key{number}")


@needs_program("java")
def test_a_java_virtual_machine(tmp_path: Path) -> None:
    """Many threads, and gigabytes that are reserved and mostly holes."""
    source = tmp_path / "Busy.java"
    source.write_text(
        "public class Busy { public static void main(String[] a) throws Exception {\n"
        'System.out.println("ready"); long sum = 0; java.util.List<byte[]> kept ='
        " new java.util.ArrayList<>();\n"
        "while (System.in.read() >= 0) { for (int i = 0; i < 100; i++) {"
        " kept.add(new byte[10000]); sum += kept.size(); }\n"
        "System.out.println(sum); } } }\n"
    )
    machine = subprocess.Popen(
        ["java", "-Xmx4g", "-XX:+UseG1GC", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        assert machine.stdout is not None
        assert machine.stdin is not None
        assert machine.stdout.readline() == b"ready\n"
        with Process(machine.pid) as process, DirtyTracker(process) as tracker:
            before = page_tables(machine.pid)
            machine.stdin.write(b"x")
            assert machine.stdout.readline() == b"5050\n"
            with tracker.collect() as round_:
                assert round_.written.bytes > 1_000_000
                round_.commit()
            with process.stopped(10 * SCALE) as stop:
                assert stop.threads > 5
            assert page_tables(machine.pid) - before < 4096, "KiB: holes make no page tables"
        machine.stdin.write(b"x")
        assert machine.stdout.readline() == b"20100\n"
    finally:
        machine.kill()
        machine.communicate()


def page_tables(pid: int) -> int:
    return int(status(pid)["VmPTE"].split()[0])


@needs_io_uring()
@needs_program("fio")
def test_the_buffers_of_fio_are_named_as_pinned(tmp_path: Path) -> None:
    """Its registered buffers are written by the kernel, past the page table."""
    options = [
        *("--name=reader", "--ioengine=io_uring", "--fixedbufs=1", "--rw=read", "--thread"),
        *("--size=4m", "--time_based", "--runtime=60", "--iodepth=4", f"--directory={tmp_path}"),
        *("--rate=1m", "--output=/dev/null"),
    ]
    fio = subprocess.Popen(["fio", *options], cwd=tmp_path)
    try:
        wait_until(
            "it has pinned its buffers",
            lambda: any(pin.detail.startswith("fixed") for pin in _pinned.look(fio.pid).pins),
        )
        with Process(fio.pid) as process, DirtyTracker(process) as tracker:
            pinned_ranges = [b for b in tracker.blind if b.reason is BlindReason.PINNED]
            assert pinned_ranges
            with tracker.collect() as round_:
                unsure = round_.unsure | round_.written
                spans = [(b.start & -PAGE, (b.end + PAGE - 1) & -PAGE) for b in pinned_ranges]
                assert unsure.bytes_in(spans) == [end - start for start, end in spans]
                round_.commit()
        assert fio.poll() is None
    finally:
        fio.send_signal(signal.SIGINT)
        fio.wait(30 * SCALE)
