"""Waits of a handover: for the owner's exit, for a connection, in threads and in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    ClosedError,
    Handover,
    HandoverError,
    ProcessGoneError,
    Region,
    UnixListener,
    Userfaultfd,
    connect_unix,
    connect_unix_async,
    listen_unix,
    recv_uffd,
    recv_uffd_async,
    send_uffd,
    send_uffd_async,
)
from pyuffd import _handover_format as form
from tests._child import ROOT, run_child
from tests._memory import PAGE
from tests.kernel._serving import open_fds, wait_in_system_call

NR_POLL = 7
SHORT_S = 0.05
LONG_S = 60.0  # only against a bug
OWNER = """
import sys
from pyuffd import Region, Userfaultfd, connect_unix, send_uffd
opened = Userfaultfd(user_mode_only=True)  # for anybody
with opened as uffd, Region.memfd(8192) as region, connect_unix(sys.argv[1]) as sock:
    uffd.register(region)
    send_uffd(sock, uffd, [region], memory=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def listener() -> Iterator[UnixListener]:
    with tempfile.TemporaryDirectory() as folder, listen_unix(f"{folder}/socket") as listening:
        yield listening


@contextlib.contextmanager
def handed_over() -> Iterator[tuple[Handover, subprocess.Popen[bytes]]]:
    """Receive a userfaultfd from another process, which exits when its stdin is closed."""
    with listener() as listening:
        command = [sys.executable, "-c", OWNER, listening.path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
        try:
            with listening.accept(timeout_s=LONG_S) as sock:
                received = recv_uffd(sock, timeout_s=LONG_S)
            with received:
                yield received, process
        finally:
            process.kill()
            process.communicate()


def owners_exit() -> None:
    with handed_over() as (received, process):
        assert received.uffd.owner_pid == process.pid
        info = Path(f"/proc/self/fdinfo/{received.pidfd()}").read_text()
        assert f"Pid:\t{process.pid}\n" in info
        assert not received.wait_exit(timeout_s=0)
        assert not received.wait_exit(timeout_s=SHORT_S)

        async def main() -> None:
            waiting = asyncio.create_task(received.exited())
            cancelled = asyncio.create_task(received.exited())
            await asyncio.sleep(SHORT_S)
            assert not waiting.done()
            cancelled.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled
            process.send_signal(signal.SIGKILL)
            await asyncio.wait_for(waiting, LONG_S)
            await received.exited()

        asyncio.run(main())
        assert received.wait_exit(timeout_s=LONG_S)
        poll = select.poll()
        poll.register(received.pidfd(), select.POLLIN)
        assert poll.poll(0)
        before = len(open_fds())
        assert received.wait_exit()
        assert len(open_fds()) == before
    for use in (received.pidfd, received.wait_exit, lambda: asyncio.run(received.exited())):
        with pytest.raises(ClosedError):
            use()


def test_the_owners_exit() -> None:
    run_child(owners_exit, budget_s=30)


def exit_before() -> None:
    """The owner is gone when its message is received."""
    with listener() as listening:
        command = [sys.executable, "-c", OWNER, listening.path]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, check=True)
        assert done.returncode == 0
        with listening.accept() as sock, recv_uffd(sock) as received:
            assert received.wait_exit(timeout_s=0)
            asyncio.run(received.exited())


def test_an_owner_that_had_exited() -> None:
    run_child(exit_before, budget_s=30)


def another_owner() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd:
        send_uffd(theirs, uffd, [])
        with recv_uffd(ours) as received:
            assert received.uffd.owner_pid == os.getpid()
            assert not received.wait_exit(timeout_s=0)
            received.uffd.owner_pid = None
            with pytest.raises(ValueError, match="unknown"):
                received.pidfd()
            with subprocess.Popen(["sleep", "60"]) as process:
                received.uffd.owner_pid = process.pid
                assert not received.wait_exit(timeout_s=0)
                process.kill()
                process.wait()
                assert received.wait_exit(timeout_s=LONG_S)
            received.uffd.owner_pid = None
            received.uffd.owner_pid = os.getpid()
            assert not received.wait_exit(timeout_s=0)
            received.uffd.owner_pid = process.pid
            with pytest.raises(ProcessGoneError):
                received.pidfd()
            assert received.wait_exit(timeout_s=0)
            for bad, error in ((-1, ValueError), ("1", TypeError), (float("nan"), ValueError)):
                with pytest.raises(error):
                    received.wait_exit(timeout_s=bad)  # type: ignore[arg-type]


def test_an_owner_that_is_not_the_sender() -> None:
    run_child(another_owner)


def accept_ended() -> None:
    """Closing the listener ends accept() in other threads, without a connection."""
    with listener() as listening:
        errors: list[BaseException] = []

        def accept() -> None:
            try:
                listening.accept(timeout_s=None)
            except ClosedError as error:
                errors.append(error)

        threads = [threading.Thread(target=accept) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            wait_in_system_call(thread, NR_POLL)
        listening.close()
        for thread in threads:
            thread.join(LONG_S)
        assert len(errors) == 2
        with pytest.raises(ClosedError):
            listening.accept()


def test_accept_ends_when_the_listener_is_closed() -> None:
    run_child(accept_ended)


def accepts_in_a_loop() -> None:
    async def main() -> None:
        with listener() as listening:
            with pytest.raises(HandoverError, match="in time"):
                await listening.accept_async(timeout_s=SHORT_S)
            cancelled = asyncio.create_task(listening.accept_async(timeout_s=None))
            await asyncio.sleep(SHORT_S)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            # A connection that comes later is the next call's.
            waiting = asyncio.create_task(listening.accept_async())
            theirs = await connect_unix_async(listening.path)
            ours = await asyncio.wait_for(waiting, LONG_S)
            with theirs, ours:
                assert ours.getblocking()
                assert theirs.getblocking()
                theirs.sendall(b"x")
                assert ours.recv(1) == b"x"
            closed = asyncio.create_task(listening.accept_async(timeout_s=None))
            await asyncio.sleep(SHORT_S)
            await asyncio.to_thread(listening.close)
            with pytest.raises(ClosedError):
                await asyncio.wait_for(closed, LONG_S)

    asyncio.run(main())


def test_accept_in_a_loop() -> None:
    run_child(accepts_in_a_loop, budget_s=20)


def full_queue() -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            with listen_unix(f"{folder}/s", backlog=0) as full, connect_unix(full.path):
                with pytest.raises(HandoverError, match="full"):
                    await connect_unix_async(full.path, timeout_s=SHORT_S)
                waiting = asyncio.create_task(connect_unix_async(full.path))
                await asyncio.sleep(SHORT_S)
                full.accept().close()
                (await asyncio.wait_for(waiting, LONG_S)).close()
            with pytest.raises(FileNotFoundError):
                await connect_unix_async(full.path)
        with pytest.raises(ValueError, match="abstract"):
            await connect_unix_async("\0abstract")

    asyncio.run(main())


def test_connecting_in_a_loop() -> None:
    run_child(full_queue)


def transfer_in_a_loop() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, Userfaultfd() as uffd, Region.memfd(2 * PAGE) as region:
            uffd.register(region)
            receiving = asyncio.create_task(recv_uffd_async(ours))
            await asyncio.sleep(SHORT_S)
            await send_uffd_async(theirs, uffd, [region], memory=True)
            with await asyncio.wait_for(receiving, LONG_S) as received:
                assert [each.start for each in received.regions] == [region.start]
                received.uffd.copy(region.start, b"c" * PAGE)
                assert region.read(0, 1) == b"c"
            # A peer that sends half of it.
            before = open_fds()
            fds = [uffd.fileno()]
            header = form.HEADER.pack(form.MAGIC, form.VERSION, 40, 1, 1)
            socket.send_fds(theirs, [header], fds)
            with pytest.raises(HandoverError) as caught:
                await recv_uffd_async(ours, timeout_s=SHORT_S)
            assert caught.value.reason == "timeout"
            assert open_fds() == before
        ours, theirs = socket.socketpair()
        with ours, theirs, Userfaultfd() as uffd:
            before = open_fds()
            socket.send_fds(theirs, [header], [uffd.fileno()])
            cancelled = asyncio.create_task(recv_uffd_async(ours, timeout_s=None))
            await asyncio.sleep(SHORT_S)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert open_fds() == before
            theirs.close()
            with pytest.raises(HandoverError) as caught:
                await recv_uffd_async(ours)
            assert caught.value.reason == "closed"

    asyncio.run(main())


def test_transfer_in_a_loop() -> None:
    run_child(transfer_in_a_loop, budget_s=20)


async def cancelled_after(
    turns: int, work: Coroutine[Any, Any, Any], event: Callable[[], object]
) -> bool:
    """Let a task wait, cause its event, and cancel it some turns of the loop later.

    Returns whether it was too late: what the task has got is closed.
    """
    task = asyncio.create_task(work)
    await asyncio.sleep(SHORT_S)
    event()
    for _ in range(turns):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
        return False
    (await task).close()
    return True


async def accept_beside(turns: int) -> bool:
    with listener() as listening, socket.socket(socket.AF_UNIX) as client:
        work = listening.accept_async()
        return await cancelled_after(turns, work, lambda: client.connect(listening.path))


async def receive_beside(turns: int) -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        work = recv_uffd_async(ours)
        return await cancelled_after(turns, work, lambda: send_uffd(theirs, uffd, [region]))


def cancelled_beside_the_event() -> None:
    """A server that is cancelled as a client connects must not go on with the next client."""

    async def main() -> None:
        before = open_fds()
        for beside in (accept_beside, receive_beside):
            late = [await beside(turns) for turns in range(8)]
            assert late == sorted(late)
            assert set(late) == {False, True}
        assert open_fds() == before

    asyncio.run(main())


def test_a_cancellation_beside_the_event_counts() -> None:
    run_child(cancelled_beside_the_event, budget_s=20)


SEND: Any = send_uffd_async
RECEIVE: Any = recv_uffd_async
BAD: list[tuple[Any, type[Exception]]] = [
    (lambda sock, uffd: RECEIVE("x"), TypeError),
    (lambda sock, uffd: RECEIVE(sock, max_regions=-1), ValueError),
    (lambda sock, uffd: RECEIVE(sock, timeout_s=-1), ValueError),
    (lambda sock, uffd: SEND(sock, uffd, 5), TypeError),
    (lambda sock, uffd: SEND(sock, 5, []), TypeError),
    (lambda sock, uffd: SEND(sock, uffd, [], timeout_s="1"), TypeError),
    (lambda sock, uffd: SEND(sock, uffd, [], allow_uids=5), TypeError),
]


@pytest.mark.parametrize(("call", "error"), BAD)
def test_bad_arguments(call: Any, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, pytest.raises(error):
        asyncio.run(call(ours, uffd))
