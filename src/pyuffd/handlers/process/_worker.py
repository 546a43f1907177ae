"""The worker process of the process driver: an engine, its workers, and calls of the owner (L4).

It is a fork of the keeper (`_keeper`), whose book tells what an earlier worker process served. If
that one died, this one continues from there.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import pickle
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyuffd import _memory
from pyuffd._describe import text_of
from pyuffd._errors import HandlerError, UffdError, UffdOSError
from pyuffd._latch import RLock
from pyuffd._overlay import OverlaySource, with_files
from pyuffd.handlers._served_parts import Part
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import (
    Content,
    Failure,
    FailureStage,
    LeafKind,
    Opening,
    Protect,
    RangeId,
    RangeSpec,
    SourceFailure,
    SourceKind,
    Taken,
    outline_of,
)
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._book import Book, ServedBook, SpaceBook
from pyuffd.handlers.process._calls import KINDS, Answer, Call, Message
from pyuffd.handlers.process._clean import clean_worker
from pyuffd.handlers.process._successor import follow_parent, hold_descriptors
from pyuffd.handlers.process._transport import PackedSource, unpack
from pyuffd.lowlevel import Granted

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd.sources import PageSource

log = logging.getLogger(__name__)


def run(
    keeper: int, control: socket.socket, reports: socket.socket, book: Book, shared: mmap.mmap
) -> None:
    """Serve until the keeper tells to stop, or ends."""
    clean_worker()
    if not follow_parent(keeper):
        return
    try:
        hold_descriptors(
            _memory.buffer_address(shared)[0], keeper, [control.fileno(), reports.fileno()]
        )
    except OSError as error:
        log.warning(
            "pyuffd: if this process is killed while it reads a Fork event, the fork is lost: %s",
            error,
        )
    worker = WorkerProcess(control, reports, book, shared)
    worker.take_over(book)
    worker.answer_calls()


class WorkerProcess:
    """The engine, and the ranges it serves by number."""

    def __init__(
        self, control: socket.socket, reports: socket.socket, book: Book, shared: mmap.mmap
    ) -> None:
        self._control = control
        self._reports = reports
        self._send_lock = RLock()
        self._restarts = book.restarts
        self._gave_up = book.gave_up
        self._served: dict[int, RangeId] = {}
        self._space_fds: dict[int, int] = {}
        self._space_keys: dict[int, int] = {}
        address, _, self._shared = _memory.buffer_address(shared)
        self._engine = WorkedEngine(
            book.spaces[0].fd,
            workers=book.workers,
            keeper_fd=reports.fileno(),
            shared=address,
            failed=self._report_failure,
            **book.options,
        )
        engine = self._engine
        self._does: dict[Call, Callable[..., Any]] = {
            Call.HELLO: self.hello,
            Call.ADD_SPACE: self.add_space,
            Call.FIND_SPACE: self.find_space,
            Call.REMOVE_SPACE: self.remove_space,
            Call.ADD: self.add,
            Call.FIND: self.find,
            Call.OPEN: self.open,
            Call.SET_IOCTLS: engine.set_ioctls,
            Call.LIST_REGISTERED: self.list_registered,
            Call.UNLIST_REGISTERED: engine.unlist_registered,
            Call.UNSERVE: self.unserve,
            Call.START: self.start,
            Call.END: engine.end,
            Call.HELD: engine.held,
            Call.HURRY: engine.hurry,
            Call.DRAIN: engine.drain,
            Call.REFUSE: engine.refuse,
            Call.ABANDON: self.abandon,
            Call.POPULATE: engine.populate,
            Call.POPULATE_RANGES: engine.populate_ranges,
            Call.LOAD: engine.load,
            Call.FILL: self.fill,
            Call.TAKE_IN: engine.take_in,
            Call.WRITEPROTECT: self.writeprotect,
            Call.STATES: engine.states,
            Call.PAUSE: engine.pause,
            Call.RESUME: engine.resume,
            Call.RETRY: engine.retry,
            Call.SPACES: self.spaces,
            Call.OWNER_EXITED: self.owner_exited,
            Call.STATS: self.stats,
            Call.RECENT: engine.recent,
            Call.TAKE_FAULTS: engine.take_faults,
            Call.FAILURE: self.failure,
            Call.FAILURE_AT: self.failure_at,
        }

    # Continuing after another worker process

    def take_over(self, book: Book) -> None:
        """Serve the ranges of the book, as the worker process before did."""
        for number, space in book.spaces.items():
            if number:
                self._engine.adopt_space(
                    space.fd,
                    number,
                    is_fork=space.is_fork,
                    layout_events=space.layout_events,
                    owner_pid=space.owner_pid,
                )
            for unmap in space.expected:
                self._engine.expect_unmap(number, unmap.start, unmap.end)
            if space.registered is not None:
                self._engine.list_registered(number, sorted(space.registered), is_all=True)
        for id_, served in book.served.items():
            self._take_over_range(id_, served, book.spaces, refusing=book.refusing)
        self._engine.replay(book.reported)
        self._reply(Message(0, Answer.REPLAYED))
        _wire.close_all(book.rescued)
        # The engine has duplicates of those that it needs; the keeper has its own.
        for served in book.served.values():
            _wire.close_all(served.fds)
        for number, space in book.spaces.items():
            if space.states_fd >= 0:
                os.close(space.states_fd)
            if number and not space.is_fork:
                self._space_fds[number] = space.fd
        if book.refusing:
            self._engine.refuse()
        if book.cpus is not None:
            self.start(book.cpus)
            self._engine.wake_all()

    def _take_over_range(
        self, id_: int, book: ServedBook, spaces: dict[int, SpaceBook], *, refusing: bool
    ) -> None:
        spec = book.spec
        self._served[id_] = RangeId(spec.space, id_, spec.start, spec.length)
        try:
            # A process that only poisons loads no source, in which its predecessor may have hung.
            content, local = (
                (_unread(spec), None) if refusing else _open(spec, book.fds, retry=True)
            )
        except (OSError, ValueError) as error:
            # Faults in it are poisoned as those of any range that is not served.
            log.error(
                "pyuffd: [%#x, +%#x) could not be taken over: %s", spec.start, spec.length, error
            )
            return
        for number, space in spaces.items():
            own_states = space.states_fd < 0 or spec.shared
            for piece in space.pieces.get(id_, ()):
                taken = Taken(
                    piece,
                    book.fds[-1] if own_states else space.states_fd,
                    0 if own_states else piece.states_offset,
                )
                self._add(replace(spec, space=number), content, local, taken=taken)
                place = RangeId(number, id_, piece.start, piece.end - piece.start)
                self._engine.set_ioctls(place, book.ioctls)

    # Calls

    def answer_calls(self) -> None:
        """Answer the owner's calls in order; a call that may wait gets a thread of its own."""
        while True:
            try:
                message, fds = _wire.receive(self._control)
            except EOFError:
                return  # the keeper is gone
            except _wire.DescriptorsLostError as error:
                lost = HandlerError(f"the worker process failed: {text_of(error)}")
                described = _wire.pickled_error(lost, with_traceback=False)
                self._reply(Message(error.message.number, Answer.REFUSED, described))
                continue
            if message.word == Call.CLOSE:
                self._engine.destroy()
                return
            if message.word == Call.ORPHAN:
                self._seal_all()
                return
            kind = KINDS[Call(message.word)]
            if not kind.waits or not self._answer_beside(message, fds):
                self._answer(message, fds)

    def _answer_beside(self, message: Message, fds: list[int]) -> bool:
        """Answer in a new thread; return False if none can be started."""
        try:
            threading.Thread(target=self._answer, args=(message, fds), daemon=True).start()
        except RuntimeError:
            return False
        return True

    def _answer(self, message: Message, fds: list[int]) -> None:
        call = Call(message.word)
        try:
            args = _wire.unpacked(message.body)
            value = self._does[call](*args, *([fds] if KINDS[call].has_fds else []))
            self._reply(Message(message.number, Answer.DONE, _wire.packed(value)))
        except BaseException as error:  # the owner raises it
            refused = isinstance(error, UffdError | ValueError) and error.__cause__ is None
            described = _wire.pickled_error(error, with_traceback=not refused)
            self._reply(Message(message.number, Answer.REFUSED, described))

    def _reply(self, message: Message) -> None:
        data = _wire.encode(message)
        with self._send_lock:
            _wire.sendall(self._control, data)

    def _report_failure(self, failure: SourceFailure) -> None:
        sent = _wire.failure_of(failure.error, failure.start, failure.length)
        self._reply(Message(0, Answer.FAILED, _wire.packed(sent)))

    def hello(self) -> None:
        """Answer once the engine exists."""

    def start(self, cpus: list[int]) -> None:
        """Start the engine; the workers run its loop too, so all threads get the CPUs."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        self._engine.start(cpus)

    def find(self, space: int, start: int) -> RangeId | None:
        """Return the range that was put in there, or None."""
        found = [one for one in self._served.values() if (one.space, one.start) == (space, start)]
        # An older one has been cut: the newest is the one that `add` has put in.
        return max(found, key=lambda one: one.number, default=None)

    def add_space(self, layout_events: int, owner_pid: int, key: int, fds: list[int]) -> int:
        """Serve another userfaultfd too; `find_space` finds its space by `key`."""
        space = self._engine.add_space(fds[0], layout_events=layout_events, owner_pid=owner_pid)
        self._space_fds[space] = fds[0]
        self._space_keys[key] = space
        return space

    def list_registered(
        self, space: int, ranges: tuple[tuple[int, int], ...], is_all: bool
    ) -> None:
        """Note what is registered in the owner."""
        self._engine.list_registered(space, ranges, is_all=is_all)

    def find_space(self, key: int) -> int | None:
        """Return the space that an interrupted `add_space` made, or None."""
        return self._space_keys.get(key)

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd."""
        self._engine.remove_space(space)
        if space in self._space_fds:
            os.close(self._space_fds.pop(space))

    def add(self, spec: RangeSpec, fds: list[int]) -> RangeId:
        """Serve a range."""
        try:
            content, local = _open(spec, fds, retry=False)
            served = self._add(spec, content, local, states_fd=fds[-1])
        finally:
            _wire.close_all(fds)
        self._served[served.number] = served
        return served

    def _add(
        self,
        spec: RangeSpec,
        content: Content,
        local: mmap.mmap | None,
        *,
        states_fd: int = -1,
        taken: Taken | None = None,
    ) -> RangeId:
        address = _memory.buffer_address(local)[0] if local is not None else 0
        here = replace(spec, content=content, local=address, local_file=None, owner=local)
        return self._engine.add(here, states_fd=states_fd, taken=taken)

    def open(self, served: RangeId, how: Opening, fds: list[int]) -> int:
        """Register a range in the owner, and begin to serve it."""
        try:
            return self._engine.open(served, how, Granted(), fds[0] if fds else None)
        finally:
            _wire.close_all(fds)

    def fill(
        self, served: RangeId, offset: int, length: int, unprotected: bool, fds: list[int]
    ) -> int:
        """Fill pages from the beginning of a file that the owner has written."""
        try:
            data = mmap.mmap(fds[0], length, prot=mmap.PROT_READ)
        finally:
            _wire.close_all(fds)
        address, _, _owner = _memory.buffer_address(data)
        return self._engine.fill(served, offset, address, length, unprotected=unprotected)

    def writeprotect(
        self, served: RangeId, offset: int, length: int, pages: int, how: Protect
    ) -> bytes:
        """Protect pages, or lift the protection."""
        return self._engine.writeprotect(served, offset, length, pages, how)

    def unserve(
        self,
        served: RangeId,
        seal: bool,
        unregister: bool,
        patience_s: float,
        gently: bool,
        part: Part | None,
    ) -> bool:
        """Take a range, or a part of it, out."""
        done = self._engine.unserve(
            served,
            seal=seal,
            unregister=unregister,
            patience_s=patience_s,
            gently=gently,
            part=part,
        )
        if done and part is None:
            self._served.pop(served.number, None)
        return done

    def abandon(self, served: RangeId | None, failed: bool) -> None:
        """Poison the pages that wait for a worker, of one range or all."""
        self._engine.abandon(served, failed=failed)

    def stats(self) -> object:
        """Return the counters of this worker process, and how many died before it."""
        return replace(self._engine.stats(), restarts=self._restarts)

    def failure(self) -> Failure | None:
        """Return the first failure; repeated deaths of worker processes come before others."""
        failure = self._engine.failure()
        if not self._gave_up:
            return failure
        pages = self._engine.stats().poisoned_pages
        return Failure(pages, 0, 0, errno.EOWNERDEAD, FailureStage.SOURCE)

    def failure_at(self, address: int) -> tuple[pickle.PickleBuffer, int, int] | None:
        """Return what a source raised for this page, or what is known of the first failure."""
        found = self._engine.failure_at(address)
        if found is None:
            return None
        return _wire.failure_of(found.error, found.start, found.length)

    def spaces(self) -> int:
        """Return the number of address spaces served."""
        return self._engine.spaces

    def owner_exited(self) -> bool:
        """Return whether the process whose memory is served has exited."""
        return self._engine.owner_exited

    def _seal_all(self) -> None:
        """Seal all ranges after the owner's end: forks and others get SIGBUS instead of zeros."""
        self._engine.refuse()
        self._engine.abandon()
        for served in list(self._served.values()):
            try:
                self._engine.unserve(served, seal=True, unregister=False)
            except UffdOSError as error:
                log.debug("%s", error)


class _LostSource:
    """Replaces a source that the successor of a dead worker process could not load."""

    length = None

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, offset: int, length: int) -> Buffer:
        """Raise the error that loading the source raised."""
        raise OSError(errno.EIO, f"the page source is lost: {self._error}") from self._error


def _load(packed: object, *, retry: bool) -> PageSource | None:
    if not isinstance(packed, PackedSource):
        return None
    try:
        return unpack(packed)
    except ValueError as error:
        if retry:
            return _LostSource(error)
        raise


def _unread(spec: RangeSpec) -> Content:
    if spec.content.kind in (SourceKind.ZERO, SourceKind.NONE):
        return Content(spec.content.kind)
    lost = _LostSource(OSError(errno.EIO, "it is not read now"))
    return Content(SourceKind.REQUEST, owner=lost, outline=outline_of(spec.content))


def _open(spec: RangeSpec, fds: list[int], *, retry: bool) -> tuple[Content, mmap.mmap | None]:
    """Return the content, and if needed a mapping of the range's memory in this process."""
    files = len(spec.content.fds)
    content = spec.content.with_fds(fds[:files])
    owner = _load(spec.content.owner, retry=retry)
    if isinstance(owner, OverlaySource) and content.overlay is not None:
        leaves = [leaf for leaf in content.overlay.leaves if leaf.kind is LeafKind.FILE]
        owner = with_files(owner, [(leaf.fd, leaf.offset) for leaf in leaves])
    content = replace(content, owner=owner)
    if spec.local_file is None:
        return content, None
    local = mmap.mmap(fds[files], spec.length, mmap.MAP_SHARED, offset=spec.local_file[1])
    return content, local
