"""Calls to the keeper process, answered in any order (layer L4).

One thread sends the calls and reads the answers. No signal handler runs in it, so an exception
never leaves half a message in the stream. It polls a pidfd too, since a fork of this process may
hold the other end of the socket open after the keeper has ended.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from pyuffd._describe import described, log_error
from pyuffd._errors import HelperLostError
from pyuffd._latch import Latch, RLock
from pyuffd._limits import start_thread
from pyuffd._owned import Descriptor
from pyuffd._polling import Poll
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._calls import Answer, Call, Message
from pyuffd.handlers.process._start import (
    HelperProcess,
    cannot_start,
    starting,
)

log = logging.getLogger(__name__)

# An interpreter starts in 0.1 s, or in some seconds on a heavily loaded machine.
START_LIMIT_S = 60.0
# How long the helper may need to seal its ranges and join its threads before it is killed.
EXIT_LIMIT_S = 15.0
# How long to wait, when a handler ends, beyond a call's own limit: far longer than needed.
ANSWER_LIMIT_S = 5.0
# The keeper runs no code of the user's: one that says nothing for so long is frozen (SIGSTOP).
KEEPER_LIMIT_S = 5.0
# The same after the ending was interrupted (Ctrl-C).
HURRY_LIMIT_S = 1.5
# How long it may take to kill a worker process and start its successor.
REPLACE_LIMIT_S = 20.0
LOOK_S = 0.1
# How long a killed helper, or one that has closed its socket, may need to end.
END_LIMIT_S = 5.0


class HelperLink:
    """A keeper process, and the thread that talks to it."""

    def __init__(self, name: str) -> None:
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Begun] = {}
        self._queue: deque[_Queued | None] = deque()
        # Guards `_wake` and the start; reentrant, as a signal handler may call too.
        self._lock = RLock()
        self._wake = Descriptor()
        self._ready = self._lost = False
        self._give_up_at = math.inf
        self._died: BaseException | None = None
        self._how = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._process = HelperProcess()
        self._begun = Latch()
        self._is_cancelled = self._is_ending = False
        self._is_left_behind = False
        self._is_leaving = False
        self._not_started: BaseException | None = None

    def start(self) -> None:
        """Start the thread, which starts the process; the caller calls `close` on failure."""
        with starting("eventfd2"):
            self._wake = Descriptor.eventfd()
        try:
            start_thread(self._thread)
        except OSError as error:
            raise cannot_start(str(error)) from error
        self._begun.wait()
        if self._not_started is not None:
            raise self._not_started

    def introduce(self, options: object, fds: tuple[int, ...]) -> None:
        """Send the first message, and wait until the helper is ready."""
        message = Message(0, Call.HELLO, _wire.packed(options))
        self._post(_Queued(_wire.encode(message, len(fds)), fds))
        self.call(Call.HELLO, limit_s=START_LIMIT_S)
        self._ready = True
        self._process.is_ready()

    @property
    def helper(self) -> tuple[int, int, int]:
        """The helper's pid and pidfd, and the pipe that is closed with its last process."""
        return self._process.pid, self._process.pidfd, self._process.life

    def leave(self) -> None:
        """Expect the helper to end from now on."""
        self._is_leaving = True

    def call(
        self,
        what: Call,
        *args: object,
        fds: tuple[int, ...] = (),
        limit_s: float | None = None,
    ) -> Any:
        """Make a call and return or raise its result."""
        if self._is_ending and limit_s is None and not fds:
            return self.call_at_end(what, *args)
        call = self._begin(what, args, fds)
        if not call.done.wait(limit_s):
            raise cannot_start(f"it gave no answer for {limit_s:.0f} s")
        return self._result(call)

    def call_by(self, send: Callable[[int, bytes], None], what: Call, *args: object) -> Any:
        """Make a call whose message `send` sends, with what must come before it.

        It gets the number of a socket, and what it raises is raised here.
        """
        call = self._begin(what, args, (), send)
        call.done.wait(None)
        return self._result(call)

    def call_at_end(
        self, what: Call, *args: object, limit_s: float = 0.0, patience_s: float | None = None
    ) -> Any:
        """Make a call that needs at most `limit_s`, even if a source never returns.

        If the worker process does not answer, because a source holds its GIL, it is replaced, and
        its successor poisons and answers. If the keeper does not answer, it is killed. Neither
        has to say anything within `patience_s`, the limit by default: a source may need so long.
        """
        self._is_ending = True
        call, began = self._begin(what, args, ()), time.monotonic()
        listen_at = began + (limit_s if patience_s is None else patience_s)
        # The keeper answers one of them, and the worker the other.
        keeper, worker = self._begin(Call.PIDS, (), ()), self._begin(Call.SPACES, (), ())
        since = began
        while not call.done.wait(LOOK_S):
            now = time.monotonic()
            if keeper.done.is_set() and worker.done.is_set():
                keeper, worker = self._begin(Call.PIDS, (), ()), self._begin(Call.SPACES, (), ())
                since = now
            silent_s = now - max(since, listen_at)
            if silent_s > KEEPER_LIMIT_S and not keeper.done.is_set():
                self._kill(call)
            elif silent_s > ANSWER_LIMIT_S or now > min(
                began + limit_s + ANSWER_LIMIT_S, self._give_up_at
            ):
                self._replace_worker(call)
        return self._result(call)

    def _kill(self, call: _Begun) -> None:
        log.warning(
            "pyuffd: the helper process %d does not answer: it is killed", self._process.pid
        )
        self.leave()
        self._process.kill()
        call.done.wait(END_LIMIT_S)

    def hurry(self, *args: object) -> None:
        """Tell the worker process to hurry, and wait for answers no longer than it then needs."""
        self._give_up_at = time.monotonic() + HURRY_LIMIT_S
        self.tell(Call.HURRY, *args)

    def _replace_worker(self, call: _Begun) -> None:
        self._give_up_at = math.inf
        keeper = self._begin(Call.PIDS, (), ())
        self.tell(Call.REPLACE)
        if not keeper.done.wait(KEEPER_LIMIT_S) or not call.done.wait(REPLACE_LIMIT_S):
            self._kill(call)

    def _begin(
        self,
        what: Call,
        args: tuple[object, ...],
        fds: tuple[int, ...],
        send: Callable[[int, bytes], None] | None = None,
    ) -> _Begun:
        number, call = next(self._numbers), _Begun()
        data = _wire.encode(Message(number, what, _wire.packed(args)), len(fds))
        self._calls[number] = call
        self._post(_Queued(data, fds, None if send is None else partial(self._send, number, send)))
        return call

    def _send(self, number: int, send: Callable[[int, bytes], None], data: bytes) -> None:
        try:
            send(self._process.socket.fileno(), data)
        except Exception as error:
            call = self._calls.pop(number, None)
            if call is not None:
                call.error = error
                call.done.set()

    def _result(self, call: _Begun) -> Any:
        if call.error is not None:
            raise call.error
        if call.payload is None:
            raise self._lost_error()
        if not call.ok:
            raise _wire.load_error(call.payload)
        return _wire.unpacked(call.payload)

    def tell(self, what: Call, *args: object) -> None:
        """Make a call without waiting for its result."""
        message = Message(next(self._numbers), what, _wire.packed(args))
        self._post(_Queued(_wire.encode(message)))

    def _post(self, message: _Queued | None) -> None:
        self._queue.append(message)
        with self._lock:
            if self._wake.is_open:
                os.eventfd_write(self._wake.number, 1)
        if self._lost:
            self._forget_all()

    def _lost_error(self) -> HelperLostError:
        cause = str(self._died) if self._died is not None else f"it {self._how}"
        error = (
            HelperLostError(
                f"the helper process {self._process.pid} is gone: {cause}. on_error applies to"
                " each missing page that is touched, and stop() poisons the others"
            )
            if self._ready
            else cannot_start(cause)
        )
        error.__cause__ = self._died
        return error

    # The thread

    def _run(self) -> None:
        if self._start_process():
            self._talk()

    def _start_process(self) -> bool:
        # No signal handler runs in this thread, so none can raise between vfork(2) and the line
        # that notes the process.
        with self._lock:
            try:
                if not self._is_cancelled:
                    self._process.start()
                return not self._is_cancelled
            except BaseException as error:
                self._not_started = error
                self._process.undo_start()
                return False
            finally:
                self._begun.set()

    def _talk(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while self._step():
                    pass
            if self._process.ended(END_LIMIT_S):
                self._how = self._process.how()
            else:
                self._how = "has closed its connection"
        except Exception as error:  # no memory, or poll(2) with RLIMIT_NOFILE below three
            self._how = f"cannot be reached: {described(error)}"
        finally:  # otherwise every call would wait forever
            self._lost = True
            self._forget_all()
        if self._ready and not self._is_leaving:
            log_error(log, str(self._lost_error()), self._died)

    def _step(self) -> bool:
        """Wait for an event and handle it; return False when the helper has ended."""
        poll = Poll()
        for fd in (self._process.socket.fileno(), self._process.pidfd, self._wake.number):
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll())
        if self._wake.number in ready:
            os.eventfd_read(self._wake.number)
            self._send_queue()
        if self._process.socket.fileno() in ready:
            message, _ = _wire.receive(self._process.socket, ended=self._process.pidfd)
            self._take(message)
            return True
        return self._process.pidfd not in ready

    def _send_queue(self) -> None:
        while self._queue:
            message = self._queue.popleft()
            if message is None:
                self._process.socket.shutdown(socket.SHUT_WR)
                continue
            try:
                if message.send is not None:
                    message.send(message.data)
                    continue
                _wire.sendall(
                    self._process.socket, message.data, message.fds, ended=self._process.pidfd
                )
            except (EOFError, OSError) as error:
                # The helper may have told why: read until its end.
                log.debug("not sent: %s", error)
            finally:
                message.close()

    def _take(self, message: Message) -> None:
        number, answer, payload = message
        if number:
            call = self._calls.pop(number, None)
            if call is not None:
                call.ok, call.payload = answer == Answer.DONE, payload
                call.done.set()
        elif answer == Answer.DIED:
            self._died = _wire.load_error(payload)
        else:
            log.warning("pyuffd: %s", _wire.unpacked(payload))

    def _forget_all(self) -> None:
        """Let every thread that waits know that there will be no answer."""
        while self._queue:
            with contextlib.suppress(IndexError):  # another thread does the same
                message = self._queue.popleft()
                if message is not None:
                    message.close()
        for number in list(self._calls):
            call = self._calls.pop(number, None)
            if call is not None:
                call.done.set()

    @property
    def is_open(self) -> bool:
        """Whether close() has something to do."""
        return self._wake.is_open and not self._is_left_behind

    def close(self, limit_s: float | None = None) -> None:
        """Let the helper end, and kill it after `limit_s`; may be called again."""
        self.leave()
        if self._is_left_behind:
            return
        with self._lock:  # the thread holds it while it starts the process
            self._is_cancelled = True
        if self._process.pidfd < 0:
            self._process.undo_start()
            self._wake.close()
            return
        if self._thread.ident is not None and self._ready:
            self._post(None)
            if not self._process.ended(EXIT_LIMIT_S if limit_s is None else limit_s):
                log.warning(
                    "pyuffd: the helper process %d does not end: killing it", self._process.pid
                )
        may_kill = self._process.kill()
        if not self._process.ended(END_LIMIT_S if may_kill else 0):
            self._is_left_behind = True
            # FUSE, for example, waits for an answer to a request even after SIGKILL. The socket and
            # the pidfd stay open, and the thread ends when the helper does.
            log.warning(
                "pyuffd: the helper process %d cannot be killed, since %s: it is left behind",
                self._process.pid,
                "it waits for a file system" if may_kill else "it belongs to another user",
            )
            return
        self._process.how()
        # When the interpreter is finalized, a daemon thread neither runs nor ends.
        if self._thread.ident is not None and not sys.is_finalizing():
            self._thread.join()
        with self._lock:
            self._wake.close()
        self._process.close()


class _Queued:
    """Bytes to send, with duplicates of the descriptors to send.

    `send` sends them, if it is set.
    """

    def __init__(
        self,
        data: bytes,
        fds: tuple[int, ...] = (),
        send: Callable[[bytes], None] | None = None,
    ) -> None:
        self.data = data
        self.send = send
        # An interrupted caller may close its own before they are sent.
        self._owners = [Descriptor.duplicate(fd) for fd in fds]

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(owner.number for owner in self._owners)

    def close(self) -> None:
        for owner in self._owners:
            owner.close()


class _Begun:
    """A call that waits for its answer; `payload` stays None when the helper is gone.

    `error`: it was not sent.
    """

    def __init__(self) -> None:
        self.done = Latch()
        self.ok = False
        self.error: Exception | None = None
        self.payload: bytes | None = None
