"""A snapshot of this very process: a helper process takes it, since nobody can stop himself.

The helper is told what to do by one pickled request, and answers with pickled progress and one
pickled result, all by one socket. It does not need the GIL of this process, whose threads it stops
as it stops those of any other.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import closing, suppress
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

from pyuffd import _remote_calls as calls
from pyuffd._errors import HelperLostError
from pyuffd._limits import limit_hint, start_thread
from pyuffd._owned import Descriptor
from pyuffd._polling import Poll
from pyuffd._stdio import socketpair_above_stdio
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._request import Request, SnapshotReport
from pyuffd.snapshot._take import check, take

_LENGTH = struct.Struct("=Q")
# The helper's snapshot leaves nothing if it ends by itself; it may have to wait for its disk.
END_S = 10.0
# The snapshot may get its name: nobody has raised an exception meanwhile.
_GO_ON = b"g"
AGAIN_S = 0.005  # until an end that was swallowed is tried again
_PROGRAM = (
    "import sys; sys.path[:] = {path!r};"
    " from pyuffd.snapshot._helper import main; main({fd}, {pid})"
)


def take_by_helper(request: Request) -> SnapshotReport:
    """Take a snapshot of this process; see `Snapshot.take`."""
    begin = time.perf_counter()
    with Process(os.getpid()) as me:  # before the helper starts, which needs longer than this
        check(me, request)
    ours, theirs = socketpair_above_stdio()
    with closing(ours):
        with theirs:
            helper = _start(theirs.fileno())
        try:
            calls.allow_tracer(helper.pid)
            with suppress(ConnectionError):  # it has ended: `_result` says how
                _send(ours, replace(request, progress=None))
            report = _result(ours, helper, request)
        finally:
            _end(helper)
    return replace(report, seconds=time.perf_counter() - begin)


def _start(fd: int) -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise HelperLostError(
            f"a snapshot of one's own process needs a Python interpreter that can be started, but"
            f" sys.executable is {sys.executable!r}, as in a program that is frozen or embeds"
            " Python: take the snapshot from another process"
        )
    program = _PROGRAM.format(path=[entry for entry in sys.path if entry], fd=fd, pid=os.getpid())
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[fd],
            start_new_session=True,
        )
    except OSError as error:
        raise HelperLostError(
            "the process that takes a snapshot of one's own process could not be started:"
            f" {error.filename or sys.executable}: {error.strerror}"
            f"{limit_hint(error)}"
        ) from error


def _result(
    ours: socket.socket, helper: subprocess.Popen[bytes], request: Request
) -> SnapshotReport:
    while True:
        message = _receive(ours)
        if isinstance(message, SnapshotProgress):
            if request.progress is not None:
                request.progress(message)
            if message.phase == "name":
                with suppress(ConnectionError):  # it has ended
                    ours.sendall(_GO_ON)
        elif isinstance(message, SnapshotReport):
            return message
        elif isinstance(message, BaseException):
            raise message
        else:
            code = helper.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
            raise HelperLostError(f"the process that takes the snapshot ended {how}")


def _end(helper: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended; if it was to do more, it cleans up first."""
    with suppress(ProcessLookupError):
        helper.terminate()
    try:
        helper.wait(END_S)
    except BaseException:
        helper.kill()
        helper.wait()
        raise


def _send(to: socket.socket, what: object) -> None:
    packed = pickle.dumps(what)
    to.sendall(_LENGTH.pack(len(packed)) + packed)


def _receive(ours: socket.socket) -> Any:
    """Return the next message, or None at the end."""
    (length,) = _LENGTH.unpack(_exactly(ours, _LENGTH.size) or bytes(_LENGTH.size))
    packed = _exactly(ours, length) if length else b""
    return pickle.loads(packed) if packed else None


def _exactly(ours: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        try:
            part = ours.recv(length - len(found))
        except ConnectionError:
            return b""
        if not part:
            return b""
        found += part
    return bytes(found)


# In the helper


def main(fd: int, pid: int) -> NoReturn:
    """Do one request of the process `pid`, and end."""
    code = 1
    try:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side decides, by SIGTERM
            signal.signal(signal.SIGTERM, _terminate)
            signal.signal(signal.SIGALRM, _again)
            sys.unraisablehook = _unraisable
            _work(fd, pid)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except ProcessLookupError:  # nobody is left who could be told
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
    finally:
        # What Python does at the end is of no use here, and could be interrupted with a traceback.
        os._exit(code)


def _work(fd: int, pid: int) -> None:
    with socket.socket(fileno=fd) as theirs, Descriptor.of_process(pid) as owner:
        start_thread(threading.Thread(target=_follow, args=(owner.number,), daemon=True))
        request = _receive(theirs)
        if request is None:
            return
        try:
            with Process(pid) as process:
                answer: object = take(process, replace(request, progress=_Sender(theirs)))
        except Exception as error:
            answer = _portable(error)
        with suppress(OSError):
            _send(theirs, answer)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it cleans up, once
    sys.exit(128 + signal.SIGTERM)


_swallowed = False  # the end, and it is to be raised again


def _again(number: int, frame: FrameType | None) -> None:
    global _swallowed
    if _swallowed:  # an alarm may be left over
        _swallowed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _terminate(number, frame)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """Raise the end again, if a finalizer or a callback has swallowed it."""
    global _swallowed
    if isinstance(what.exc_value, SystemExit):
        _swallowed = True
        # It repeats: an alarm just before a system call that sleeps does not interrupt it.
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    else:
        sys.__unraisablehook__(what)


def _follow(pidfd: int) -> None:
    """End when the process that is to be saved has ended."""
    poll = Poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)


class _Sender:
    """Sends progress, as long as there is room: who is to read it may be stopped.

    Before the snapshot gets its name it waits until all progress has been told: `take` that raises
    leaves no snapshot.
    """

    def __init__(self, to: socket.socket) -> None:
        self._to = to

    def __call__(self, progress: SnapshotProgress) -> None:
        if progress.phase == "name":
            _send(self._to, progress)
            if self._to.recv(len(_GO_ON)) != _GO_ON:
                raise ProcessLookupError
            return
        poll = Poll()
        poll.register(self._to, select.POLLOUT)
        if poll.poll(0):
            with suppress(OSError):
                _send(self._to, progress)


def _portable(error: Exception) -> Exception:
    """Return the error as it can be sent: without what pickle refuses."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return HelperLostError(f"the process that takes the snapshot failed: {error!r}")
    return error
