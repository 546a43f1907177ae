"""The server of lazy pages, with a client that does what CRIU does."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests._child import limit_s

pytest.importorskip("google.protobuf")

from pyuffd import ClosedError, CriuError, Feature, Userfaultfd, _working_set_files
from pyuffd.criu import Images, LazyPages, RemotePages, RestoreReport
from pyuffd.criu._working_set import length_of
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._run import SCALE
from tests.criu._client import FINISHED
from tests.criu._images import LAZY, PAGE, pattern, write_pagemap
from tests.criu._page_server import Server as PageServer
from tests.criu._programs import (
    PID,
    ROOT,
    ZOMBIE,
    Client,
    children_of,
    served,
    serving,
    write_images,
)
from tests.kernel._serving import wait_until

pytestmark = [
    needs(Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_REMOVE),
    needs_privilege("CAP_SYS_PTRACE"),
]


def wait_for(true: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + 30 * SCALE
    while not true():
        assert time.monotonic() < give_up, f"{what} did not come"
        time.sleep(0.01)


def test_closed_twice(tmp_path: Path) -> None:
    """The second close() failed with EBADF, as did stop() after it."""
    write_images(tmp_path, [0x10000], [1], [(0, 0, 1)])
    server = LazyPages(tmp_path)
    for end in (server.close, server.close, server.stop):
        end()
    with pytest.raises(ClosedError), server:
        raise AssertionError("the block runs")
    with pytest.raises(ClosedError):
        server.serve()


def test_serves_a_restore(tmp_path: Path) -> None:
    pages, runs = (64, 2000), [(0, 3, 10), (0, 40, 1), (1, 0, 1200), (1, 1500, 499)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs, zombies=[ZOMBIE])
        with LazyPages(tmp_path) as server:
            with serving(server) as reports:
                client.connect(server, zombies=[ZOMBIE])
                assert [client.ask("stamps", 0), client.ask("stamps", 1)] == stamps
            assert not os.path.exists(tmp_path / "lazy-pages.socket")
        assert client.ask("registered") == 0
        (report,) = reports
        assert report.error is None
        assert (report.processes, report.zombies) == (1, 1)
        assert report.content_bytes == sum(count for _, _, count in runs) * PAGE
        assert report.loaded_bytes <= report.content_bytes
        assert report.faults >= 1
        assert [client.ask("stamps", 0), client.ask("stamps", 1)] == stamps


def test_one_server_restores_many_times(tmp_path: Path) -> None:
    pages, runs = (100,), [(0, 5, 90)]
    with Client(*pages) as first:
        stamps = write_images(tmp_path, first.starts, pages, runs)
        with LazyPages(tmp_path, restores=0) as server:
            with serving(server) as reports:
                first.connect(server)
                assert first.ask("stamps") == stamps[0]
                for _ in range(2):
                    with Client(*pages) as client:
                        client.connect(server)
                        assert client.ask("stamps") == stamps[0]
                wait_for(lambda: len(reports) == 3, "the third restore")
                server.stop()
            assert [report.number for report in reports] == [1, 2, 3]


def test_a_layout_that_changes_right_after(tmp_path: Path) -> None:
    """While nothing but faults is filled, and the rest afterwards."""
    pages, runs = (4096,), [(0, 0, 4096)]
    hot = tmp_path / "hot"
    with Client(*pages) as client:
        stamps = write_images(tmp_path / "images", client.starts, pages, runs)[0]
        with (
            LazyPages(tmp_path / "images", working_set=hot, record_s=0.2) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            seen = client.ask("change")
        assert seen["dropped"] == [0] * 1024
        assert seen["moved"] == stamps[2048:3072]
        assert seen["kept"] == stamps[3072:]
        assert client.ask("registered") == 0
        assert reports[0].error is None


def test_a_fork_gets_its_pages(tmp_path: Path) -> None:
    pages, runs = (2048,), [(0, 0, 1000), (0, 1100, 900)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs)[0]
        with (
            LazyPages(tmp_path, working_set=tmp_path / "hot", record_s=0.3) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            assert client.ask("fork") == [stamps, stamps]
        assert reports[0].error is None
        assert reports[0].forks == 1


def test_a_working_set_is_written_and_filled_first(tmp_path: Path) -> None:
    pages, runs = (512,), [(0, 0, 512)]
    hot = tmp_path / "hot"
    with Client(*pages) as client:
        write_images(tmp_path / "images", client.starts, pages, runs)
        with (
            LazyPages(tmp_path / "images", working_set=hot, record_s=1.0) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            for page in (300, 7, 8, 90):
                client.ask("page", 0, page)
        assert reports[0].recorded_pages == 5
        assert reports[0].hot_bytes == 0
        images = Images(tmp_path / "images")
        known = _working_set_files.load(str(hot), images.id, length_of(images))
        assert known is not None
        pages_of_it = [
            page // PAGE
            for run in known
            for page in range(run.offset, run.offset + run.length, PAGE)
        ]
        assert pages_of_it == [0, 300, 7, 8, 90]


def test_a_working_set_that_is_damaged_is_recorded_anew(tmp_path: Path) -> None:
    """One that is whole is filled first; what it names is never content."""
    pages, runs = (512,), [(0, 0, 512)]
    hot = tmp_path / "hot"
    hot.write_bytes(b"pyuffdws" + bytes(80))
    with Client(*pages) as client:
        write_images(tmp_path / "images", client.starts, pages, runs)
        images = Images(tmp_path / "images")
        with (
            LazyPages(images, working_set=hot, record_s=0.5) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            client.ask("page", 0, 77)
        assert (reports[0].recorded_pages, reports[0].hot_bytes) == (2, 0)
    with Client(*pages) as client:
        stamps = write_images(tmp_path / "images", client.starts, pages, runs)[0]
        images = Images(tmp_path / "images")
        _working_set_files.add(str(hot), images.id, length_of(images), [(500, 12), (3, 1)])
        with (
            LazyPages(images, working_set=hot) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            # Reading all pages may otherwise be over before the first one is filled.
            wait_until(lambda: any(one.hot_bytes for one in server.reports), "it is filled first")
            assert client.ask("stamps") == stamps
        assert reports[0].recorded_pages == 0
        assert 0 < reports[0].hot_bytes < 30 * PAGE


@pytest.mark.parametrize("who", ["worker", "worker, in the middle"])
def test_a_worker_that_is_killed(tmp_path: Path, who: str) -> None:
    pages, runs = (20000,), [(0, 0, 20000)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs)[0]
        hot = None if who == "worker, in the middle" else tmp_path / "hot"
        with LazyPages(tmp_path, working_set=hot, record_s=2.0) as server:
            keeper = server._spare.handler()._running_engine().pids()[0]  # type: ignore[union-attr]
            with serving(server) as reports:
                client.connect(server)
                client.ask("page", 0, 77)
                worker = min(children_of(keeper))
                os.kill(worker, signal.SIGKILL)
                assert client.ask("stamps") == stamps
        assert reports[0].error is None
        assert reports[0].helper_restarts == 1
        assert client.ask("stamps") == stamps


def command(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyuffd", "criu-lazy-pages", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        pass_fds=[int(str(words[-1]))] if words[-2] == "--status-fd" else (),
    )


def test_the_command_is_killed(tmp_path: Path) -> None:
    """What was not filled is poisoned: SIGBUS, and never zeros."""
    pages, runs = (64, 64), [(0, 0, 64), (1, 0, 32)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs)
        program = command("-D", tmp_path, "--working-set", tmp_path / "hot", "--record-for", "600")
        assert program.stdout is not None
        assert "listening at" in program.stdout.readline()
        client.connect(str(tmp_path / "lazy-pages.socket"))
        for page in (3, 5):
            assert client.ask("page", 0, page) == stamps[0][page]
        helpers = children_of(program.pid)
        program.kill()
        program.communicate()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in helpers), "the end")
        assert client.ask("page", 0, 3) == stamps[0][3]
        assert client.ask("page", 1, 50) == 0, "there was nothing"
        with pytest.raises(EOFError):
            client.ask("page", 0, 4)


def test_the_command(tmp_path: Path) -> None:
    pages, runs = (512,), [(0, 0, 500)]
    ready, status = os.pipe()
    work = tmp_path / ("work" * 40)  # too long for a socket's path
    work.mkdir()
    here = os.open(work, os.O_PATH)
    with Client(*pages) as client:
        stamps = write_images(tmp_path / "images", client.starts, pages, runs)
        program = command(
            *("-D", tmp_path / "images", "-W", work, "--json", "--pidfile", "pid"),
            *("-d", "--status-fd", str(status)),
        )
        os.close(status)
        assert os.read(ready, 2) == b"\0"
        os.close(ready)
        assert program.wait(60 * SCALE) == 0, "it continues in the background"
        assert int((work / "pid").read_text()) != program.pid
        client.connect(f"/proc/{os.getpid()}/fd/{here}/lazy-pages.socket")
        os.close(here)
        assert client.ask("stamps") == stamps[0]
        out, _ = program.communicate(timeout=limit_s(60))
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0] == {"event": "listening", "socket": str(work / "lazy-pages.socket")}
    assert events[-1]["event"] == "restore"
    assert events[-1]["content_bytes"] == 500 * PAGE
    assert events[-1]["error"] is None


def test_the_command_fails_with_the_restore(tmp_path: Path) -> None:
    with Client(4) as client:
        write_images(tmp_path, client.starts, (4,), [(0, 0, 4)])
    program = command("-D", tmp_path)
    assert program.stdout is not None
    program.stdout.readline()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "lazy-pages.socket"))
    out, _ = program.communicate(timeout=limit_s(60))
    assert program.returncode == 1
    assert "restore 1 failed: criu restore has gone" in out


def test_images_that_are_cut_while_they_are_served(tmp_path: Path) -> None:
    """The pages that are lost are poisoned, and the others are right."""
    pages, runs = (64,), [(0, 0, 64)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs)[0]
        with (
            LazyPages(tmp_path, working_set=tmp_path / "hot", record_s=1.0) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            os.truncate(tmp_path / f"pages-{PID}.img", 40 * PAGE)
            assert client.ask("page", 0, 20) == stamps[20]
        assert reports[0].error
        assert [client.ask("page", 0, page) for page in range(40)] == stamps[:40]
        with pytest.raises(EOFError):
            client.ask("page", 0, 40)


def send(*parts: bytes | list[int]) -> Callable[[socket.socket], None]:
    def to(sock: socket.socket) -> None:
        for part in parts:
            if isinstance(part, bytes):
                sock.sendall(part)
            else:
                rights = array.array("i", part)
                sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    return to


def word(number: int) -> bytes:
    return struct.pack("<i", number)


HOSTILE: dict[str, Callable[[int, int], Callable[[socket.socket], None]]] = {
    "nothing": lambda uffd, other: send(),
    "half a word": lambda uffd, other: send(b"\1"),
    "the end at once": lambda uffd, other: send(FINISHED),
    "pid 0": lambda uffd, other: send(word(0)),
    "the least pid": lambda uffd, other: send(word(-(1 << 31))),
    "an unknown pid": lambda uffd, other: send(word(5), [uffd]),
    "an unknown zombie": lambda uffd, other: send(word(-5)),
    "a process as a zombie": lambda uffd, other: send(word(-PID)),
    "a zombie as a process": lambda uffd, other: send(word(ZOMBIE), [uffd]),
    "no descriptor": lambda uffd, other: send(word(PID), b"\0"),
    "two descriptors": lambda uffd, other: send(word(PID), [uffd, uffd]),
    "no userfaultfd": lambda uffd, other: send(word(PID), [other]),
    "a descriptor with the pid": lambda uffd, other: send([uffd], b"\0\0\0"),
    "twice": lambda uffd, other: send(word(PID), [uffd], word(PID), [uffd]),
    "a zombie twice": lambda uffd, other: send(word(-ZOMBIE), word(-ZOMBIE)),
    "not all": lambda uffd, other: send(word(PID), [uffd], FINISHED),
    "a request of the web": lambda uffd, other: send(b"GET / HTTP/1.1\r\n\r\n"),
}


def failed(reports: list[RestoreReport], number: int) -> bool:
    return len(reports) >= number and bool(reports[number - 1].error)


def test_hostile_clients(tmp_path: Path) -> None:
    """Each ends its own restore only, and the next one works."""
    pages, runs = (16,), [(0, 0, 8)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs, zombies=[ZOMBIE])[0]
        with served(tmp_path, restores=len(HOSTILE) + 1) as server:
            for number, (name, sends) in enumerate(HOSTILE.items(), 1):
                with (
                    socket.socket(socket.AF_UNIX) as sock,
                    Userfaultfd(features=Feature.EVENT_FORK) as uffd,
                    open("/dev/null", "rb") as other,
                ):
                    sock.connect(server.path)
                    try:
                        sends(uffd.fileno(), other.fileno())(sock)
                        sock.shutdown(socket.SHUT_WR)
                    except (BrokenPipeError, OSError):
                        pass
                    wait_for(partial(failed, server.reports, number), name)
            client.connect(server, zombies=[ZOMBIE])
            assert client.ask("stamps") == stamps
        assert server.reports[-1].error is None


def test_stop_in_the_middle(tmp_path: Path) -> None:
    """At once: what was not filled is poisoned."""
    pages, runs = (64,), [(0, 0, 64)]
    with Client(*pages) as client:
        stamps = write_images(tmp_path, client.starts, pages, runs)[0]
        with (
            LazyPages(tmp_path, working_set=tmp_path / "hot", record_s=600) as server,
            serving(server) as reports,
        ):
            client.connect(server)
            assert client.ask("page", 0, 9) == stamps[9]
            server.stop(now=True)
        # It may be closed before its thread sees that it was stopped.
        assert any(word in str(reports[0].error) for word in ("stopped", "closed"))
        assert client.ask("page", 0, 9) == stamps[9]
        with pytest.raises(EOFError):
            client.ask("page", 0, 10)


@contextmanager
def page_server(
    folder: Path, client: Client, **options: Any
) -> Iterator[tuple[LazyPages, PageServer]]:
    """Serve the client's first region, all of whose pages a page server has."""
    start = client.starts[0]
    write_pagemap(folder, PID, [(start, PAGES, LAZY)])
    server = PageServer("4.2", {PID: start}, most=7)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.serve, args=(theirs,))
    thread.start()
    try:
        with (
            RemotePages(ours) as pages,
            served(folder, page_server=pages, **options) as lazy,
        ):
            yield lazy, server
    finally:
        theirs.close()
        thread.join()


PAGES = 600
REMOTE = [int.from_bytes(pattern(number)[:8], "little") for number in range(PAGES)]


@pytest.mark.parametrize("is_killed", [False, True])
def test_pages_of_a_page_server(tmp_path: Path, is_killed: bool) -> None:
    """The connection outlives a worker process that is killed."""
    with Client(PAGES + 10) as client:
        write_images(tmp_path, client.starts, (PAGES + 10,), [])
        hot = {"working_set": tmp_path / "hot", "record_s": 1.0} if is_killed else {}
        with page_server(tmp_path, client, **hot) as (lazy, server):
            keeper = lazy._spare.handler()._running_engine().pids()[0]  # type: ignore[union-attr]
            client.connect(lazy)
            assert client.ask("page", 0, 99) == REMOTE[99]
            if is_killed:
                os.kill(min(children_of(keeper)), signal.SIGKILL)
            assert client.ask("stamps") == REMOTE + [0] * 10
        (report,) = lazy.reports
        assert report.error is None
        assert report.helper_restarts == is_killed
        assert report.content_bytes == PAGES * PAGE
        assert sum(count for _, count in server.asked) >= PAGES
        assert server.was_closed
        assert client.ask("registered") == 0
        assert client.ask("stamps") == REMOTE + [0] * 10


def test_a_page_server_that_goes_away(tmp_path: Path) -> None:
    """What it had not sent is poisoned, and the rest is right."""
    with Client(PAGES) as client:
        write_images(tmp_path, client.starts, (PAGES,), [])
        hot = {"working_set": tmp_path / "hot", "record_s": 600}
        with page_server(tmp_path, client, **hot) as (lazy, server):
            client.connect(lazy)
            assert client.ask("page", 0, 99) == REMOTE[99]
            server.stop()
            lazy.stop(now=True)
        assert lazy.reports[0].error
        assert client.ask("page", 0, 99) == REMOTE[99]
        with pytest.raises(EOFError):
            client.ask("page", 0, 100)


def test_remote_images_need_a_page_server(tmp_path: Path) -> None:
    with Client(4) as client:
        write_images(tmp_path, client.starts, (4,), [])
        write_pagemap(tmp_path, PID, [(client.starts[0], 4, LAZY)])
    with pytest.raises(ValueError, match="is_remote"):
        LazyPages(Images(tmp_path, is_remote=True))
    program = command("-D", tmp_path, "--page-server")
    _, err = program.communicate(timeout=limit_s(60))
    assert (program.returncode, "--port" in err) == (2, True)


def test_a_socket_that_a_dead_server_has_left(tmp_path: Path) -> None:
    with Client(4) as client:
        write_images(tmp_path, client.starts, (4,), [(0, 0, 4)])
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "lazy-pages.socket"))
        with LazyPages(tmp_path) as server:
            with pytest.raises(CriuError, match="another server"):
                LazyPages(tmp_path)
            with serving(server):
                client.connect(server)
