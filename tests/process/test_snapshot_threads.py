"""What "cow" does where many threads write: its work for a page, and how long each one waits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pyuffd import Pagemap, Region, RegisterMode, Userfaultfd
from pyuffd._saver_calls import Saver
from pyuffd.snapshot._cow import NEEDED
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import limit_s, run_child
from tests._memory import PAGE
from tests.process._counters import new_file
from tests.process.test_snapshot import wait_until

pytestmark = [needs_privilege("CAP_SYS_PTRACE"), needs(NEEDED)]
THREADS = 400
# Calls that wake threads, of those that wait at one time.
MOST_WAKES = 16
LIMIT_S = 0.5 * SCALE
# A page of each thread needs much longer than that, and each single one much less.
DISK_US = int(20_000 * SCALE)
SLOW_THREADS = 200
# The command, with less memory between the process and the file.
COMMAND = """
import sys
from pyuffd import Process, Snapshot, SnapshotError
from pyuffd.snapshot import _cow
_cow.MEMORY_PAGES = 64
pid, path, limit_s = sys.argv[1:]
with Process(int(pid)) as process:
    request = dict(method="cow", rate=1, durable=False, max_stall_s=float(limit_s))
    try:
        Snapshot.take(process, path, progress=lambda _: None, **request)
    except SnapshotError as error:
        print(error.reason)
    else:
        print("taken")
"""


def waiting(uffd: Userfaultfd) -> int:
    """Return how many faults are unread."""
    with open(f"/proc/self/fdinfo/{uffd.fileno()}") as fdinfo:
        fields = dict(line.split(":", 1) for line in fdinfo)
    return int(fields["pending"])


@contextmanager
def saver_of(uffd: Userfaultfd, path: Path) -> Iterator[Saver]:
    """Save pages of this process, before the instant."""
    with Pagemap() as pagemap, new_file(path / "pages") as fd:
        saver = Saver(
            pid=os.getpid(),
            uffd=uffd.fileno(),
            pagemap_fd=pagemap.fileno(),
            mem_fd=-1,
            fd=fd,
            memory_pages=64,
            max_stall_ns=int(60e9 * SCALE),
            rate=0,
        )
        with closing(saver):
            yield saver


def woken_by_few(path: str) -> None:
    with Region.anonymous(2 * THREADS * PAGE) as region, Userfaultfd(features=NEEDED) as uffd:
        for index in range(THREADS):
            region.write(2 * index * PAGE, b"x")
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region)
        threads = [
            threading.Thread(target=region.write, args=(2 * index * PAGE, b"y"))
            for index in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: waiting(uffd) == THREADS)
        with saver_of(uffd, Path(path)) as saver:
            for thread in threads:
                thread.join()
            stats = saver.stats()
        assert stats.before == THREADS
        assert 1 <= stats.wakes <= 2 * MOST_WAKES


def test_many_that_wait_are_woken_by_few_calls(tmp_path: Path) -> None:
    """The kernel looks at every waiting thread for each of them."""
    run_child(woken_by_few, str(tmp_path), budget_s=30)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Compile writers.c and disk_faults.c."""
    folder = tmp_path_factory.mktemp("threads")
    sources = Path(__file__).parent
    program, library = folder / "writers", folder / "disk_faults.so"
    shared: list[str | Path] = ["-shared", "-fPIC", sources / "disk_faults.c", "-ldl"]
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, sources / "writers.c"], check=True)
    subprocess.run(["cc", "-O1", "-o", library, *shared], check=True)
    return str(program), str(library)


def test_no_writer_waits_longer_than_the_limit(programs: tuple[str, str], tmp_path: Path) -> None:
    """Others are let through meanwhile, one after the other, as a slow disk takes their pages."""
    program, library = programs
    target = subprocess.Popen(
        [program, str(SLOW_THREADS), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert target.stdout is not None
        target.stdout.readline()
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(target.pid), str(tmp_path / "one"), str(LIMIT_S)],
            capture_output=True,
            text=True,
            timeout=limit_s(60),
            env={**os.environ, "LD_PRELOAD": library, "DISK_US": str(DISK_US)},
        )
        assert (done.stdout, done.stderr) == ("stalled\n", "")
        longest_s = int(target.communicate("\n", timeout=limit_s(60))[0]) / 1e6
    finally:
        target.kill()
        target.communicate()
    assert longest_s < 2 * LIMIT_S
