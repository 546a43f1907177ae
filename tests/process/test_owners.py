"""The owner of a userfaultfd's memory: how it is known, what needs it, and who is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PageSource,
    PageState,
    ProcessGoneError,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    connect_unix,
    listen_unix,
    recv_uffd,
    send_uffd,
)
from pyuffd.handlers._checks import Driver
from pyuffd.handover import HandoverRange
from pyuffd.testing import FaultingChild, needs, needs_privilege
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import ROOT, limit_s, run_child
from tests.kernel._faults import fork
from tests.kernel._serving import in_fork, wait_until
from tests.process._peer import Link, peer

PAGE = 4096
WP = RegisterMode.WP
MISSING = RegisterMode.MISSING
FORK = Feature.EVENT_FORK
THREAD_ID = Feature.THREAD_ID
PFWP = Feature.PAGEFAULT_FLAG_WP
UNPOPULATED = Feature.WP_UNPOPULATED
DRIVERS: tuple[Driver, ...] = ("native", "thread", "process")

pytestmark = needs(Feature(0))


class Broken:
    """A page source that has every page but the fifth; it can be pickled."""

    length = None

    def read(self, offset: int, length: int) -> bytes:
        if offset <= 4 * PAGE < offset + length:
            raise OSError(errno.EIO, "cannot be read")
        return b"c" * length


def broken_source(driver: Driver) -> PageSource:
    """A source without a fifth page, of the kind that a driver reads."""
    if driver != "native":
        return Broken()
    fd = os.memfd_create("cut-short")
    os.write(fd, b"c" * 8 * PAGE)
    source = FileSource(fd)
    os.ftruncate(fd, 8 * PAGE)
    return source


def cut(source: PageSource) -> None:
    """Truncate a file before the fifth page, once it is served."""
    if isinstance(source, FileSource):
        os.ftruncate(os.open(f"/proc/self/fd/{source.fileno()}", os.O_RDWR), 4 * PAGE)
        source.close()


# How the owner is known


def own_values() -> None:
    with Userfaultfd(features=FORK) as uffd, Region.anonymous(PAGE) as region:
        assert uffd.owner_pid == os.getpid()
        uffd.owner_pid = os.getpid()
        for other in (os.getppid(), None):
            with pytest.raises(ValueError):
                uffd.owner_pid = other
        uffd.register(region)
        with (
            Userfaultfd.from_fd(os.dup(uffd.fileno())) as unknown,
            Userfaultfd.from_fd(os.dup(uffd.fileno()), owner_pid=os.getpid()) as known,
        ):
            assert (unknown.owner_pid, known.owner_pid) == (None, os.getpid())
            unknown.owner_pid = os.getpid()
            assert unknown.owner_pid == os.getpid()
            unknown.owner_pid = None
            for bad in (0, -1):
                with pytest.raises(ValueError):
                    unknown.owner_pid = bad
                before = os.listdir("/proc/self/fd")
                with pytest.raises(ValueError):
                    Userfaultfd.from_fd(uffd.fileno(), owner_pid=bad)
                assert os.listdir("/proc/self/fd") == before
                with pytest.raises(ValueError):
                    Handler(uffd, owner_pid=bad)


@needs(FORK)
def test_own_values() -> None:
    run_child(own_values)


def hand_over(link: Link, path: str, how: str) -> None:
    """Send a userfaultfd of this process, in the named way."""
    with contextlib.ExitStack() as stack:
        if how == "connects":
            sock = connect_unix(path)
        elif how == "listens":
            listener = stack.enter_context(listen_unix(path))
            link.send("listening")
            sock = listener.accept(timeout_s=limit_s(10))
        else:
            sock = socket.socket(fileno=os.dup(link.receive(1)[1][0]))
        stack.enter_context(sock)
        # A process that neither connected nor listened.
        pid = fork() if how.endswith("a-fork-sends") else 0
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            return
        with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
            uffd.register(region)
            send_uffd(sock, uffd, [region])
            link.send(os.getpid())
            link.value()
    if how.endswith("a-fork-sends"):
        os._exit(0)


@needs_kernel_faults()
@pytest.mark.parametrize("how", ["connects", "listens", "inherits", "inherits-and-a-fork-sends"])
def test_the_sender_is_the_owner(tmp_path: Path, how: str) -> None:
    """Also if the kernel notes another process, or this one, as the socket's peer."""
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen_unix(path)) if how == "connects" else None
        link = stack.enter_context(peer(hand_over, path, how))
        if listener is not None:
            sock = listener.accept(timeout_s=limit_s(10))
        elif how == "listens":
            link.value()
            sock = connect_unix(path)
        else:
            sock, theirs = socket.socketpair()
            with theirs:
                link.send(fds=[theirs.fileno()])
        with sock, recv_uffd(sock, timeout_s=limit_s(10)) as received:
            sender = link.value()
            assert received.uffd.owner_pid == sender
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
            link.send("done")


def without_credentials(made_here: bool) -> None:
    """Another sender names no owner: then it is the socket's peer, unless that is this process."""
    import tests.unit.test_handover_peers as wire

    with (
        Userfaultfd() as uffd,
        listen_unix(f"{os.getcwd()}/s") as listener,
        contextlib.ExitStack() as stack,
    ):
        fd = uffd.fileno()
        if made_here:
            ours, theirs = socket.socketpair()
        else:
            pid = fork()
            if not pid:
                with connect_unix(listener.path) as sock:
                    socket.send_fds(sock, [wire.message()], [fd])
                    sock.recv(1)
                os._exit(0)
            ours = listener.accept()
        stack.enter_context(ours)
        if made_here:
            stack.enter_context(theirs)
            socket.send_fds(theirs, [wire.message()], [fd])
        with recv_uffd(ours) as received:
            assert received.uffd.owner_pid == (None if made_here else pid)


@pytest.mark.parametrize("made_here", [True, False], ids=["own-pair", "connected"])
def test_without_credentials(made_here: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(without_credentials, made_here)


def monitor_elsewhere(path: str, on_error: str) -> None:
    """Serve in a PID namespace of its own, as far as the handler allows it."""
    with connect_unix(path) as sock, recv_uffd(sock) as received:
        assert received.pid == 0
        assert received.uffd.owner_pid is None
        if on_error == "kill":
            with pytest.raises(ValueError):
                Handler(received.uffd, on_error="kill")
            # The lowest number is that of this namespace's first process.
            with pytest.raises(ValueError):
                Handler(received.uffd, on_error="kill", owner_pid=received.pid)
            os._exit(0)
        with Handler(received.uffd) as handler:
            handler.serve(received.regions[0], BufferSource(b"d" * PAGE))
            handler.start()
            sock.send(b"!")
            sock.recv(1)
            wait_until(lambda: handler.owner_exited, "the owner's exit shows without its pid")
        os._exit(0)


@needs_privilege("CAP_SYS_ADMIN")
@pytest.mark.parametrize("on_error", ["poison", "kill"])
def test_monitor_in_another_pid_namespace(tmp_path: Path, on_error: str) -> None:
    path = tmp_path / "s"
    program = f"from {__name__} import *; monitor_elsewhere({str(path)!r}, {on_error!r})"
    with listen_unix(path) as listener, Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program]
        monitor = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            with listener.accept(timeout_s=60) as sock:
                send_uffd(sock, uffd, [region])
                if on_error == "poison":
                    assert sock.recv(1)
                    # A process that owns only this exits before the monitor.
                    uffd.unregister(region)
                    uffd.close()
        finally:
            if on_error == "poison":
                monitor.kill()
                monitor.wait()
            else:
                assert monitor.wait(60) == 0


# What needs an owner


@dataclass(frozen=True)
class Crossing:
    """A handler on a userfaultfd of some kind, and whether it is refused."""

    whose: str  # "own", "known", "unknown", "unknown-told"
    driver: Driver = "native"
    options: tuple[tuple[str, Any], ...] = ()
    features: Feature = Feature(0)  # noqa: RUF009 - an immutable flag
    serve: tuple[tuple[str, Any], ...] = ()
    refused: bool = False

    @property
    def id(self) -> str:
        words = [self.whose, self.driver]
        words += [f"{key}={value}" for key, value in (*self.options, *self.serve)]
        words += [str(flag.name) for flag in self.features]
        return "-".join(words)


KILL = (("on_error", "kill"),)
SAVES = (("mode", WP), ("preserve", True))
PROTECTS = (("mode", WP),)

CROSSINGS = [
    *(
        Crossing(whose, driver, KILL, refused=whose == "unknown")
        for whose in ("own", "known", "unknown", "unknown-told")
        for driver in DRIVERS
    ),
    *(
        Crossing(whose, "inline", features=Feature.SIGBUS, refused=whose != "own")
        for whose in ("own", "known", "unknown", "unknown-told")
    ),
    *(
        Crossing(whose, "native", KILL, FORK | more, refused=whose == "unknown" or not more)
        for whose in ("own", "known", "unknown", "unknown-told")
        for more in (Feature(0), THREAD_ID)
    ),
    *(
        Crossing(whose, driver, features=PFWP, serve=SAVES, refused=whose == "unknown")
        for whose in ("own", "known", "unknown", "unknown-told")
        for driver in ("native", "thread")
    ),
    *(
        Crossing(
            whose,
            driver,
            features=PFWP | more,
            serve=PROTECTS,
            refused=whose == "unknown" and not more,
        )
        for whose in ("own", "known", "unknown", "unknown-told")
        for driver in DRIVERS
        for more in (Feature(0), UNPOPULATED)
    ),
    *(
        Crossing(whose, driver)
        for whose in ("own", "known", "unknown", "unknown-told")
        for driver in DRIVERS
    ),
]


@contextlib.contextmanager
def userfaultfd(whose: str, features: Feature) -> Iterator[tuple[Userfaultfd, Any, int]]:
    """A userfaultfd of some kind, its range, and the pid to pass to a Handler, or 0."""
    if whose == "own":
        with Userfaultfd(features=features) as uffd, Region.anonymous(8 * PAGE) as region:
            yield uffd, region, 0
        return
    with FaultingChild(pages=8, mode=None, features=features) as child:
        assert child.uffd.owner_pid == child.pid
        if whose != "known":
            child.uffd.owner_pid = None
        yield child.uffd, child.region, child.pid if whose == "unknown-told" else 0


def crossings(whose: str) -> None:
    for case in (case for case in CROSSINGS if case.whose == whose):
        print(case.id, file=sys.stderr, flush=True)
        cross(case)


def cross(case: Crossing) -> None:
    with userfaultfd(case.whose, case.features) as (uffd, region, told):
        arguments: dict[str, Any] = dict(case.serve)
        if arguments.pop("preserve", False):
            arguments["preserve"] = bytearray(region.length)
        source = None if arguments.get("mode") == WP else ZeroSource()
        options = dict(case.options)
        if told:
            options["owner_pid"] = told
        with contextlib.ExitStack() as stack:
            if case.refused:
                stack.enter_context(pytest.raises(ValueError))
            with Handler(uffd, driver=case.driver, **options) as handler:
                handler.serve(region, source, **arguments)
                if arguments.get("mode") == WP:
                    handler.writeprotect(region)
                handler.start()
                assert not handler.owner_exited
        # Even if it was refused, another handler may use it.
        if case.driver != "inline" or case.whose == "own":
            Handler(uffd).stop()


@needs(FORK | THREAD_ID | PFWP | UNPOPULATED)
@pytest.mark.parametrize("whose", ["own", "known", "unknown", "unknown-told"])
def test_crossings(whose: str) -> None:
    run_child(crossings, whose, budget_s=40)


def second_userfaultfd(primary: str) -> None:
    """Each userfaultfd that is passed to serve() has an owner of its own."""
    with contextlib.ExitStack() as stack:
        first, region, _ = stack.enter_context(userfaultfd(primary, Feature(0)))
        handler = stack.enter_context(Handler(first, driver="thread", on_error="kill"))
        handler.serve(region, ZeroSource())
        second, theirs, _ = stack.enter_context(userfaultfd("unknown", Feature(0)))
        with pytest.raises(ValueError):
            handler.serve(theirs, ZeroSource(), uffd=second)
        assert handler.spaces == 1
        # It was not claimed either.
        Handler(second).stop()
        second.owner_pid = os.getppid()  # neither dead nor the owner
        with pytest.raises(ValueError):
            handler.serve(theirs, ZeroSource(), uffd=second)


@pytest.mark.parametrize("primary", ["own", "known"])
def test_second_userfaultfd(primary: str) -> None:
    run_child(second_userfaultfd, primary)


# The wrong process


def wrong_owner() -> None:
    with FaultingChild(pages=4, mode=MISSING) as child, FaultingChild(pages=1) as stranger:
        step = child.begin("read", 0, 4)
        stranger.kill()
        with pytest.raises(ProcessGoneError):
            Handler(child.uffd, owner_pid=stranger.pid)
        ready, over = threading.Event(), threading.Event()
        ids: list[int] = []

        def idle() -> None:
            ids.append(threading.get_native_id())
            ready.set()
            over.wait()

        thread = threading.Thread(target=idle)
        thread.start()
        ready.wait()
        with pytest.raises(ValueError):
            Handler(child.uffd, owner_pid=ids[0])
        over.set()
        thread.join()
        # Alive, and another process.
        with (
            FaultingChild(pages=1) as other,
            Handler(child.uffd, owner_pid=other.pid, on_error="kill", autostart=False) as handler,
            pytest.raises(ValueError),
        ):
            handler.serve(child.region, ZeroSource())
        assert step.running, "refusing lets nobody go on with zeros"
        with Handler(child.uffd) as handler:
            handler.serve(child.region, BufferSource(b"data" * PAGE))
            handler.start()
            assert step.done() == b"data"


def test_wrong_owner() -> None:
    run_child(wrong_owner)


def wrong_owner_exits(driver: Driver) -> None:
    """The exit of a process that does not own the memory changes nothing."""
    with (
        FaultingChild(pages=2, mode=None) as child,
        FaultingChild(pages=1) as stranger,
        Handler(child.uffd, driver=driver, owner_pid=stranger.pid) as handler,
    ):
        source = BufferSource(b"data" * 2 * PAGE) if driver == "native" else Broken()
        handler.serve(child.region, source)
        handler.start()
        assert child.run("read", 0, 1) in (b"d", b"c")
        stranger.kill()
        assert child.run("read", PAGE, 1) in (b"d", b"c")
        assert not handler.owner_exited
        child.kill()
        wait_until(lambda: handler.owner_exited, "the owner's exit")


@pytest.mark.parametrize("driver", DRIVERS)
def test_wrong_owner_exits(driver: Driver) -> None:
    run_child(wrong_owner_exits, driver)


# Memory of this process at an address of another


def holes_of_another_process() -> None:
    """Missing pages are found in the owner, and memory here at the same address is not touched."""
    with (
        FaultingChild(pages=8, mode=None, features=PFWP, content=b"x" * 2 * PAGE) as child,
        Handler(child.uffd) as handler,
    ):
        # A mistake would touch this.
        address = child.region.start
        here = ctypes.CDLL(None).mmap
        here.restype, here.argtypes = ctypes.c_uint64, [ctypes.c_uint64] * 6
        assert here(address, 8 * PAGE, 0, 0x22 | 0x100000, 2**64 - 1, 0) in (address, 2**64 - 1)
        handler.serve(child.region, None, mode=WP)
        handler.start()
        handler.writeprotect(child.region)
        for page in (1, 6):
            child.run("write", page * PAGE, b"new")
        states = list(handler.page_states(child.region))
        dirty = [page for page, state in enumerate(states) if state == PageState.DIRTY]
        assert dirty == [1, 6]


@needs(PFWP)
def test_holes_of_another_process() -> None:
    run_child(holes_of_another_process)


def own_holes_beside_another_process() -> None:
    """The second userfaultfd belongs to this process, the first does not: its holes are found."""
    with (
        FaultingChild(pages=1, mode=None) as child,
        Userfaultfd(features=PFWP) as own,
        Region.anonymous(4 * PAGE) as region,
        Handler(child.uffd) as handler,
    ):
        handler.serve(region, None, mode=WP, uffd=own)
        handler.start()
        handler.writeprotect(region)
        region.write(2 * PAGE, b"new")
        assert handler.page_states(region)[2] == PageState.DIRTY


@needs(PFWP)
def test_own_holes_beside_another_process() -> None:
    run_child(own_holes_beside_another_process)


def same_addresses() -> None:
    """A fork has its memory at its parent's addresses: objects tell them apart, numbers do not."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        Region.anonymous(2 * PAGE) as region,
        Region.anonymous(PAGE) as data,
        Userfaultfd() as uffd,
    ):
        pid = fork()
        if pid == 0:
            with Userfaultfd() as own:
                send_uffd(theirs, own, [region, data])
                assert theirs.recv(1)
                os._exit(region.read(PAGE, 1) + data.read(0, 1) != b"ab")
        data.fill(ord("b"))
        with recv_uffd(ours) as received, Handler(uffd) as handler:
            there, theirs_at_data = received.regions
            assert (there.start, theirs_at_data.start) == (region.start, data.start)
            a = BufferSource(b"a" * 2 * PAGE)
            handler.serve(there, a, uffd=received.uffd)
            # Memory of this process, at an address where the other process has missing pages.
            with data.memoryview() as view:
                handler.serve(theirs_at_data, BufferSource(view), uffd=received.uffd)
            handler.serve(region, a)
            handler.start()
            assert handler.populate(region, 0, PAGE) == PAGE
            assert handler.page_states(region) == bytes([PageState.CLEAN, PageState.ABSENT])
            assert handler.page_states(there) == bytes([PageState.ABSENT, PageState.ABSENT])
            with pytest.raises(ValueError):
                handler.page_states(Range(region.start))
            ours.send(b"!")
            assert os.waitpid(pid, 0)[1] == 0
            handler.unserve(there)
            assert handler.page_states(Range(region.start))[0] == PageState.CLEAN


def test_same_addresses() -> None:
    run_child(same_addresses)


def locals_refused() -> None:
    """`local` must be memory of this process, mapped, long enough, and free of faults."""
    with (
        FaultingChild(pages=2, memory="shmem", mode=None, features=PFWP) as child,
        Region.memfd(2 * PAGE) as mine,
        Handler(child.uffd) as handler,
        Userfaultfd(features=PFWP) as uffd,
    ):
        closed = Region.memfd(2 * PAGE)
        closed.close()
        for local in (child.region, HandoverRange(PAGE, 2 * PAGE, PAGE), Range(PAGE), closed):
            with pytest.raises((ValueError, ClosedError)):
                handler.serve(
                    child.region, None, mode=WP, preserve=bytearray(2 * PAGE), local=local
                )
        handler.serve(mine, ZeroSource(), uffd=uffd)
        with pytest.raises(ValueError):
            handler.serve(child.region, None, mode=WP, preserve=bytearray(2 * PAGE), local=mine)
        assert child.region.fd is not None
        with (
            Region.file(child.region.fd, shared=False) as private,
            Region.file(child.region.fd, writable=False) as read_only,
        ):
            for local in (private, read_only):
                with pytest.raises(ValueError):
                    handler.serve(child.region, ZeroSource(), mode=RegisterMode.MINOR, local=local)


class Range:
    """A range without further attributes."""

    def __init__(self, start: int, length: int = 2 * PAGE) -> None:
        self.start, self.length = start, length


@needs(PFWP | Feature.MINOR_SHMEM)
def test_locals_refused() -> None:
    run_child(locals_refused)


# Who is killed


def hit(driver: Driver, primary: str) -> None:
    """With two owners, the one whose page could not be read, and no other process."""
    with (
        FaultingChild(pages=8, mode=None) as innocent,
        FaultingChild(pages=8, mode=None) as hit,
        Userfaultfd() as own,
        Region.anonymous(PAGE) as region,
    ):
        first = {"own": own, "innocent": innocent.uffd, "hit": hit.uffd}[primary]
        handler = Handler(first, driver=driver, on_error="kill")
        if driver == "native":
            handler.serve(region, BufferSource(b"c" * PAGE), uffd=own)
        for child in (innocent, hit):
            source = broken_source(driver)
            handler.serve(child.region, source, uffd=child.uffd)
            cut(source)
        handler.start()
        assert innocent.run("read", 0, 1) == hit.run("read", 0, 1) == b"c"
        hit.begin("read", 4 * PAGE, 1)
        assert hit.wait() == -signal.SIGKILL
        assert innocent.run("read", PAGE, 1) == b"c"
        innocent.begin("read", 4 * PAGE, 1)
        assert innocent.wait() == -signal.SIGKILL
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.crossing(every=2)
@pytest.mark.parametrize("primary", ["own", "innocent", "hit"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_hit(driver: Driver, primary: str) -> None:
    run_child(hit, driver, primary, budget_s=20)


def own_fork_is_hit(driver: Driver, pages: str) -> None:
    """A fork that touches the page is killed; its parent, other forks and the helper live."""
    with Userfaultfd(features=FORK | THREAD_ID) as uffd:
        region = Region.anonymous(8 * PAGE) if pages == "anon" else Region.memfd(8 * PAGE)
        handler = Handler(uffd, driver=driver, on_error="kill")
        source = broken_source(driver)
        handler.serve(region, source)
        cut(source)
        handler.start()

        def touch_it() -> None:
            assert region.read(0, 1) == b"c"
            thread = threading.Thread(target=region.read, args=(4 * PAGE, 1))
            thread.start()
            thread.join()

        def touch_another() -> None:
            assert region.read(PAGE, 1) == b"c"
            assert in_fork(touch_it) == -signal.SIGKILL
            assert region.read(2 * PAGE, 1) == b"c"

        assert in_fork(touch_it) == -signal.SIGKILL
        assert in_fork(touch_another) == 0
        assert region.read(3 * PAGE, 1) == b"c"
        with pytest.raises(HandlerError):
            handler.stop()
        region.close()


@needs(FORK | THREAD_ID)
@pytest.mark.parametrize("pages", ["anon", "shmem"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_own_fork_is_hit(driver: Driver, pages: str) -> None:
    run_child(own_fork_is_hit, driver, pages, budget_s=20)


def another_fork_is_hit(driver: Driver) -> None:
    """The same with forks of another process."""
    with (
        FaultingChild(pages=8, mode=None, features=FORK | THREAD_ID) as child,
        Handler(child.uffd, driver=driver, on_error="kill") as handler,
    ):
        source = broken_source(driver)
        handler.serve(child.region, source)
        cut(source)
        handler.start()
        assert child.run("fork", "read", 0, 1).value == b"c"
        assert child.run("fork", "read", 4 * PAGE, 1).returncode == -signal.SIGKILL
        assert child.run("read", PAGE, 1) == b"c"
        child.begin("read", 4 * PAGE, 1)
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(HandlerError):
            handler.stop()


@needs(FORK | THREAD_ID)
@pytest.mark.parametrize("driver", DRIVERS)
def test_another_fork_is_hit(driver: Driver) -> None:
    run_child(another_fork_is_hit, driver, budget_s=20)


def fork_in_a_namespace() -> None:
    """Its thread ids belong to another namespace: no process is killed, and it reads no zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Userfaultfd(features=FORK | THREAD_ID) as uffd, Region.anonymous(8 * PAGE) as region:
        handler = Handler(uffd, driver="thread", on_error="kill")
        handler.serve(region, Broken())
        handler.start()
        helper = subprocess.Popen(["sleep", "60"])
        assert libc.unshare(0x2000_0000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWPID

        def touch_it() -> None:
            assert os.getpid() == 1
            region.read(4 * PAGE, 1)

        # It is process 1 there, and only this signal reaches the first process of a namespace.
        assert in_fork(touch_it) in (-signal.SIGBUS, 1)
        assert helper.poll() is None
        assert region.read(PAGE, 1) == b"c"
        helper.kill()
        helper.wait()
        with pytest.raises(HandlerError):
            handler.stop()


@needs(FORK | THREAD_ID)
@needs_privilege("CAP_SYS_ADMIN")
def test_fork_in_a_namespace() -> None:
    run_child(fork_in_a_namespace)


def populate_kills_nobody(driver: Driver) -> None:
    """No process has touched the page; one that does is killed then."""
    with (
        FaultingChild(pages=8, mode=None) as child,
        Handler(child.uffd, driver=driver, on_error="kill") as handler,
    ):
        source = broken_source(driver)
        handler.serve(child.region, source)
        cut(source)
        handler.start()
        with pytest.raises(OSError):
            handler.populate(child.region)
        assert child.run("read", 0, 1) == b"c"
        assert handler.page_states(child.region)[4] == PageState.ABSENT
        child.begin("read", 4 * PAGE, 1)
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.parametrize("driver", DRIVERS)
def test_populate_kills_nobody(driver: Driver) -> None:
    run_child(populate_kills_nobody, driver, budget_s=20)
