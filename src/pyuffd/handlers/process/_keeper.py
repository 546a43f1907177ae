"""The keeper of the process driver: starts the worker process, and another one when it dies (L4).

It runs no code of the user's and has one thread, so that it can fork at any time. It passes the
owner's calls to the worker process, notes what they change, and holds every descriptor that a
successor needs. The descriptors of forks come in the reports of the worker process's engine. As
long as the keeper lives, no userfaultfd is closed while a thread waits on it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from pyuffd._describe import print_traceback, text_of
from pyuffd._errors import HandlerError, UffdError, limit_met
from pyuffd._polling import Poll
from pyuffd.handlers._types import Piece, RangeSpec, ReportKind
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._book import Book, SpaceBook
from pyuffd.handlers.process._calls import KINDS, Answer, Call, Message
from pyuffd.handlers.process._clean import clean_keeper
from pyuffd.handlers.process._notes import Notes
from pyuffd.handlers.process._successor import shared_size
from pyuffd.handlers.process._worker_handle import (
    SEND_LIMIT_S,
    WorkerGone,
    WorkerHandle,
    named,
)

REPORT = struct.Struct("=IIQQQ")  # struct uffd_report
PIECE = struct.Struct("=QQQQQQ")  # struct uffd_report_piece

# A worker process that dies this soon, this often in a row, dies of its sources: poison instead.
SHORT_LIFE_S = 1.0
SHORT_LIFE_STARTS = 10  # on a loaded machine: or within this many times its time to start
SHORT_LIVES = 5
GIVE_UP_AFTER = 20
# How long the worker process may need to seal its ranges after the owner has gone.
ORPHAN_LIMIT_S = 10.0
BASE_PAGE = 4096
# How long fork(2) may fail before the keeper gives up.
FORK_LIMIT_S = 30.0
FORK_RETRY_MS = 50


class OwnerGone(Exception):
    """The owner process ended, or has closed its end of the socket."""


@dataclass(slots=True)
class Pending:
    """A call that has not been answered, with its descriptors.

    `args`: its arguments, if the book needs them.
    """

    message: Message
    fds: list[int]
    args: tuple[Any, ...]


class Keeper:
    """Passes calls to the worker process, and keeps the book."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._to_owner = bytearray()  # not sent yet: the owner may wait in a fault with the GIL
        self._pending: OrderedDict[int, Pending] = OrderedDict()
        self._failure: bytes | None = None
        self._short_lives = 0
        self._closing = False
        self._replaying = False  # a worker process has yet to apply what its predecessor had read
        first, (uffd, self._owner_pidfd) = _wire.receive(owner)
        options, workers = _wire.unpacked(first.body)
        self._shared = mmap.mmap(-1, shared_size(options["fault_log"]))
        self._book = Book(options, workers)
        self._notes = Notes(self._book)
        self._book.spaces[0] = SpaceBook(
            uffd, False, options["layout_events"], options["owner_pid"]
        )
        self._worker = self._start_worker()

    def _start_worker(self) -> WorkerHandle:
        not_theirs = [self._owner.fileno(), self._owner_pidfd]
        return WorkerHandle(self._book, self._shared, not_theirs)

    def _start_successor(self) -> WorkerHandle:
        """Start another worker process; retry while fork(2) fails for a moment."""
        give_up = time.monotonic() + FORK_LIMIT_S
        while True:
            try:
                return self._start_worker()
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOMEM) or time.monotonic() > give_up:
                    raise
            poll = Poll()
            poll.register(self._owner_pidfd, select.POLLIN)
            if poll.poll(FORK_RETRY_MS):
                raise OwnerGone

    def run(self) -> None:
        """Work until the owner closes the handler or ends."""
        while not self._closing:
            poll = Poll()
            want = select.POLLIN | (select.POLLOUT if self._to_owner else 0)
            poll.register(self._owner, want)
            for fd in (self._owner_pidfd, self._worker.pidfd):
                poll.register(fd, select.POLLIN)
            poll.register(self._worker.control, select.POLLIN)
            poll.register(self._worker.reports, select.POLLIN)
            ready = dict(poll.poll())
            try:
                if self._worker.reports.fileno() in ready:
                    self._read_report()
                if self._worker.control.fileno() in ready:
                    self._read_reply()
                if self._worker.pidfd in ready:
                    raise WorkerGone
                if self._owner_pidfd in ready:
                    raise OwnerGone
                if self._owner.fileno() in ready:
                    self._serve_owner(ready[self._owner.fileno()])
            except WorkerGone:
                self._replace_worker()
            except OwnerGone:
                self._owner_is_gone()
                return
        self._worker.end(SEND_LIMIT_S)
        self._worker.close()

    # The owner

    def _serve_owner(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
        if not events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return
        try:
            message, fds = _wire.receive(self._owner)
        except EOFError as error:
            raise OwnerGone from error
        except _wire.DescriptorsLostError as error:
            self._refuse(error.message.number, error)
            return
        number, call = message.number, Call(message.word)
        if call is Call.PIDS:
            self._answer(number, _wire.packed((os.getpid(), self._worker.pid)))
            return
        if call is Call.REPLACE:
            self._give_up_worker()
        if call is Call.SOURCE_FAILURE:
            self._answer(number, self._failure or _wire.packed(None))
            return
        args: tuple[Any, ...] = ()
        if KINDS[call].changes_book:
            args = _wire.unpacked(message.body)
        if call is Call.ADD:
            try:
                fds.append(_states_file(args[0]))
            except OSError as error:
                _wire.close_all(fds)
                self._refuse(number, error)
                return
        self._pending[number] = Pending(message, fds, args)
        if call is Call.CLOSE:
            self._closing = True
        self._worker.send(message, fds)

    def _answer(self, number: int, payload: bytes) -> None:
        self._send_to_owner(Message(number, Answer.DONE, payload))

    def _refuse(self, number: int, error: Exception) -> None:
        """Answer a call that cannot be passed to the worker process."""
        if not isinstance(error, UffdError):
            error = HandlerError(f"the helper process failed: {text_of(error)}")
        payload = _wire.pickled_error(error, with_traceback=False)
        self._send_to_owner(Message(number, Answer.REFUSED, payload))

    def tell_end(self, error: BaseException) -> None:
        """Tell the owner which exception ends the keeper."""
        self._send_to_owner(Message(0, Answer.DIED, _wire.pickled_error(error)))

    def _warn(self, text: str) -> None:
        self._send_to_owner(Message(0, Answer.WARNING, _wire.packed(text)))

    def _send_to_owner(self, message: Message) -> None:
        self._to_owner += _wire.encode(message)
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self._owner.send(self._to_owner, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._to_owner)  # the owner is gone, as its pidfd will tell
        del self._to_owner[:sent]

    def _owner_is_gone(self) -> None:
        """Seal the ranges, so that forks and other served processes do not read zeros."""
        for _ in range(2):
            try:
                self._worker.send(Message(0, Call.ORPHAN), [])
                self._worker.end(ORPHAN_LIMIT_S)
                self._worker.close()
                return
            except WorkerGone:
                self._bury_worker()
                self._worker = self._start_worker()

    # The worker

    def _read_reply(self) -> None:
        try:
            message, _ = _wire.receive(self._worker.control)
        except EOFError as error:
            raise WorkerGone from error
        number, answer, payload = message
        if answer == Answer.BROKEN:
            self._worker.error = payload
            return
        if answer == Answer.REPLAYED:
            self._replaying = False
            self._worker.start_s = time.monotonic() - self._worker.born_s
            _wire.close_all(self._book.rescued)
            return
        if answer == Answer.FAILED:
            self._failure = self._failure or payload
            return
        call = self._pending.pop(number, None)
        if call is None:
            return
        if answer == Answer.DONE:
            self._note(call, payload)
        else:
            _wire.close_all(call.fds)
        self._send_to_owner(message)

    def _note(self, call: Pending, payload: bytes) -> None:
        """Note in the book what a call has changed; close descriptors that it need not keep."""
        what = Call(call.message.word)
        if KINDS[what].changes_book:
            self._notes.note(what, call.fds, _wire.unpacked(payload), call.args)
        _wire.close_all(call.fds)

    def _read_report(self) -> None:
        """Read a report of where the pieces are, and note it."""
        try:
            head, fds = _wire.receive_exactly(self._worker.reports, REPORT.size)
        except EOFError as error:
            raise WorkerGone from error
        kind, number, id_, count, sequence = REPORT.unpack(head)
        try:
            body, _ = _wire.receive_exactly(self._worker.reports, count * PIECE.size)
        except EOFError as error:
            _wire.close_all(fds)
            raise WorkerGone from error
        if kind == ReportKind.FORK and not fds:
            self._warn(
                "the keeper process has no descriptor left for a fork, which will read zeros if the"
                f" worker process is killed: {limit_met(errno.EMFILE)}"
            )
        pieces = [Piece(*numbers) for numbers in PIECE.iter_unpack(body)]
        self._notes.note_report(ReportKind(kind), number, id_, pieces, sequence, fds)

    def _give_up_worker(self) -> NoReturn:
        """Kill a worker process that does not answer; its successor poisons."""
        at_work = self._book.at_work()
        self._book.refusing = self._book.gave_up = True
        error = HandlerError(
            f"worker process {self._worker.pid} did not answer{at_work}: a page source may hold"
            " its GIL",
            at_work.start or None,
            at_work.length or None,
        )
        failure = _wire.failure_of(error, at_work.start, at_work.length, with_traceback=False)
        self._failure = self._failure or _wire.packed(failure)
        self._worker.kill("its keeper, as it did not answer")
        raise WorkerGone

    def _replace_worker(self) -> None:
        """Start another worker process, which continues from the last report of this one."""
        lived_s = time.monotonic() - self._worker.born_s
        exit_code = self._bury_worker()
        short_s = SHORT_LIFE_S + SHORT_LIFE_STARTS * (self._worker.start_s or lived_s)
        self._short_lives = self._short_lives + 1 if lived_s < short_s else 0
        if self._closing:
            sys.exit()
        how = f"{self._worker.how_ended(exit_code)}{self._book.at_work()}"
        pid = self._worker.pid
        if self._worker.error is not None and not self._book.restarts:
            raise HandlerError(f"worker process {pid} cannot start: it {how}")
        if self._short_lives >= GIVE_UP_AFTER:
            raise HandlerError(
                f"the worker process dies again and again; the last one, {pid}, {how}"
            )
        if self._short_lives == SHORT_LIVES:
            self._book.refusing = self._book.gave_up = True
            error = HandlerError(
                f"worker processes ended {SHORT_LIVES} times in a row: the last one, {pid}, {how}"
            )
            failure = _wire.failure_of(error, 0, 0, with_traceback=False)
            self._failure = _wire.packed(failure)
        self._book.restarts += 1
        does = "poisons pages that fault" if self._book.refusing else "asks the sources again"
        self._warn(f"worker process {pid} {how}; another one takes over and {does}")
        self._worker = self._start_successor()
        for call in list(self._pending.values()):
            self._worker.send(call.message, call.fds)

    def _bury_worker(self) -> int:
        """Read the worker process's last messages, rescue forks, and return its exit code."""
        old = self._worker
        exit_code = old.end(0)
        for sock, read in ((old.reports, self._read_report), (old.control, self._read_reply)):
            sock.settimeout(0)
            try:
                while True:
                    read()
            except WorkerGone:
                pass
        # If it had not replayed yet, the forks of its predecessor are in the book already.
        if not self._replaying:
            self._book.rescued = old.rescue_forks()
        self._replaying = True
        old.close()
        return exit_code


def _states_file(spec: RangeSpec) -> int:
    """Return a file for the states of a range's pages, which outlives a worker process."""
    pages = spec.length // spec.page_size
    with named("memfd_create", "keep the states of pages"):
        fd = os.memfd_create("uffd-states", os.MFD_CLOEXEC)
    try:
        with named("ftruncate", "keep the states of pages"):
            os.ftruncate(fd, -(-pages // BASE_PAGE) * BASE_PAGE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def main(fd: int, owner_pid: int, stderr: int, life: int) -> None:
    """Run the keeper of the process at the other end of a socket, and end this process.

    The keeper and its children hold the pipe `life` open, but no program that a page source starts.
    """
    code = 1
    try:
        code = _keep(fd, owner_pid, stderr, life)
    except BaseException as error:
        print_traceback(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        # The program waits for the end: do not spend 30 ms on taking the interpreter apart.
        os._exit(code)


def _keep(fd: int, owner_pid: int, stderr: int, life: int) -> int:
    """Run the keeper until it has nothing to do; return its exit status."""
    os.set_inheritable(life, False)
    with socket.socket(fileno=fd) as owner:
        tell: Callable[[BaseException], None] = partial(_tell_end, owner)
        try:
            clean_keeper(stderr)
            # In another PID namespace it could mistake a process for another one, and kill it.
            if os.getppid() != owner_pid:
                raise HandlerError(
                    "it is not a child of the program: the program has ended, or its children live"
                    " in another PID namespace (unshare(CLONE_NEWPID))"
                )
            keeper = Keeper(owner)
            tell = keeper.tell_end
            keeper.run()
        except EOFError:
            pass
        except Exception as error:
            tell(error)
            return 1
        except SystemExit:
            pass
    return 0


def _tell_end(owner: socket.socket, error: BaseException) -> None:
    with contextlib.suppress(OSError):
        _wire.send(owner, Message(0, Answer.DIED, _wire.pickled_error(error)))
