"""The worker process of the process driver: an engine, its threads, and calls from the owner.

It is a fork of the keeper (`_helper`), which knows what an earlier worker served; if there was
one that died, this one goes on where it was (layer L4).
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import mmap
import os
import pickle
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyuffd import _memory
from pyuffd._abi import RegisterMode
from pyuffd._errors import HandlerError, UffdError, UffdOSError
from pyuffd.handlers import _wire
from pyuffd.handlers._clean import clean_worker
from pyuffd.handlers._engine import follow_parent, hold_descriptors
from pyuffd.handlers._transport import PackedSource, unpack
from pyuffd.handlers._types import (
    Content,
    EngineOptions,
    Failure,
    FailureStage,
    Piece,
    RangeId,
    RangeSpec,
    SourceFailure,
    SourceKind,
    Taken,
)
from pyuffd.handlers._workers import WorkedEngine

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd.sources import PageSource

log = logging.getLogger(__name__)

# These wait for others; meanwhile the owner may ask for something else.
SLOW = {"populate", "drain", "unserve", "end", "remove_space"}


@dataclass(frozen=True, slots=True)
class Serving:
    """What the owner asks to be served. Descriptors come beside it, in this order, if any."""

    space: int
    start: int
    length: int
    page_size: int
    mode: RegisterMode
    kind: SourceKind
    source: PackedSource | None = None
    source_offset: int = 0
    source_length: int = 0
    local_offset: int = -1
    writes_cache: bool = False
    maps_holes: bool = False
    shared: bool = False
    label: str = ""

    @property
    def has_source_fd(self) -> bool:
        """Whether the source's descriptor comes first."""
        return self.kind is SourceKind.FILE


@dataclass(slots=True)
class ServedBook:
    """A serving that exists, and its descriptors; the last one holds its pages' states."""

    serving: Serving
    fds: list[int]
    ioctls: int = 0
    closing_may_hang: bool = False  # it asks the server of a file system


@dataclass(slots=True)
class SpaceBook:
    """An address space: its userfaultfd, and where the pieces of its servings are."""

    fd: int
    is_fork: bool
    layout_events: int
    owner_pid: int = 0  # 0: unknown, as of every fork
    states_fd: int = -1
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    expected: list[Piece] = field(default_factory=list)  # unmappings whose events are still to come


@dataclass(slots=True)
class Book:
    """What the keeper knows: enough to go on after a worker's death."""

    options: EngineOptions
    workers: int
    spaces: dict[int, SpaceBook] = field(default_factory=dict)
    served: dict[int, ServedBook] = field(default_factory=dict)
    cpus: list[int] | None = None  # of a started engine
    refusing: bool = False
    gave_up: bool = False  # refusing because workers died, not because the owner asked
    restarts: int = 0
    reported: int = 0  # the last layout event that a worker reported
    rescued: list[int] = field(default_factory=list)  # forks that the last one had not reported


def run(
    keeper: int, control: socket.socket, reports: socket.socket, book: Book, shared: mmap.mmap
) -> None:
    """Serve until the keeper says that it is enough, or ends."""
    clean_worker()
    if not follow_parent(keeper):
        return
    try:
        hold_descriptors(
            _memory.buffer_address(shared)[0], keeper, [control.fileno(), reports.fileno()]
        )
    except OSError as error:
        log.warning("a fork is lost if this process is killed as it reads of it: %s", error)
    worker = Worker(control, reports, book, shared)
    worker.take_over(book)
    worker.answer_calls()


class Worker:
    """The engine, and the servings it has by number."""

    def __init__(
        self, control: socket.socket, reports: socket.socket, book: Book, shared: mmap.mmap
    ) -> None:
        self._control = control
        self._reports = reports
        self._send_lock = threading.Lock()
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

    # Going on after another worker

    def take_over(self, book: Book) -> None:
        """Serve what is in the book, as far as it is served already."""
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
        for id_, served in book.served.items():
            self._take_over_serving(id_, served, book.spaces, refusing=book.refusing)
        self._engine.replay(book.reported)
        self._reply((0, "replayed", b""))
        _wire.close_all(book.rescued)
        # The engine has what it needs of them; the keeper has its own.
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

    def _take_over_serving(
        self, id_: int, book: ServedBook, spaces: dict[int, SpaceBook], *, refusing: bool
    ) -> None:
        serving = book.serving
        self._served[id_] = RangeId(serving.space, id_, serving.start, serving.length)
        try:
            # Who only poisons reads no source: it may be what the other worker hung in.
            content, local = (
                (_unread(serving), None) if refusing else _open(serving, book.fds, retry=True)
            )
        except (OSError, ValueError) as error:
            # Its faults are refused as unserved: no zeros.
            log.error("[%#x, +%#x) was not taken over: %s", serving.start, serving.length, error)
            return
        for number, space in spaces.items():
            own_states = space.states_fd < 0 or serving.shared
            for piece in space.pieces.get(id_, ()):
                taken = Taken(
                    piece,
                    book.fds[-1] if own_states else space.states_fd,
                    0 if own_states else piece.states_offset,
                )
                self._add(number, serving, content, local, taken=taken)
                place = RangeId(number, id_, piece.start, piece.end - piece.start)
                self._engine.set_ioctls(place, book.ioctls)

    # Calls

    def answer_calls(self) -> None:
        """Do what the owner asks for, in order; what may wait has a thread of its own."""
        while True:
            try:
                (call, name, payload), fds = _wire.receive(self._control)
            except EOFError:
                return  # the keeper is gone
            except _wire.DescriptorsLostError as error:
                lost = HandlerError(f"the worker process cannot do it: {error}")
                self._reply(
                    (error.message[0], False, _wire.pickled_error(lost, with_traceback=False))
                )
                continue
            if name == "close":
                self._engine.destroy()
                return
            if name == "orphan":
                self._seal_all()
                return
            if name not in SLOW or not self._answer_beside(call, name, payload, fds):
                self._answer(call, name, payload, fds)

    def _answer_beside(self, *call: Any) -> bool:
        """Answer in a thread of its own; False where there may be no more."""
        try:
            threading.Thread(target=self._answer, args=call, daemon=True).start()
        except RuntimeError:
            return False
        return True

    def _answer(self, call: int, name: str, payload: bytes, fds: list[int]) -> None:
        try:
            args = pickle.loads(payload)
            value = getattr(self, name)(*args, fds) if fds else self._method(name)(*args)
            self._reply((call, True, pickle.dumps(value)))
        except BaseException as error:  # the owner raises it
            refused = isinstance(error, UffdError | ValueError) and error.__cause__ is None
            self._reply((call, False, _wire.pickled_error(error, with_traceback=not refused)))

    def _method(self, name: str) -> Any:
        return getattr(self, name, None) or getattr(self._engine, name)

    def _reply(self, message: object) -> None:
        data = _wire.encode(message)
        with self._send_lock:
            _wire.sendall(self._control, data)

    def _report_failure(self, failure: SourceFailure) -> None:
        blob = _wire.pickled_error(failure.error)
        self._reply((0, "failed", pickle.dumps((blob, failure.start, failure.length))))

    def hello(self) -> None:
        """Say that the engine is there."""

    def start(self, cpus: list[int]) -> None:
        """Start; the workers run the loop, so that they need the CPUs as well."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        self._engine.start(cpus)

    def find(self, space: int, start: int) -> RangeId | None:
        """Return the range that was put in there, if there is one."""
        served = self._served.values()
        return next((one for one in served if (one.space, one.start) == (space, start)), None)

    def add_space(self, layout_events: int, owner_pid: int, key: int, fds: list[int]) -> int:
        """Serve another userfaultfd as well; `find_space` knows it by `key`."""
        space = self._engine.add_space(fds[0], layout_events=layout_events, owner_pid=owner_pid)
        self._space_fds[space] = fds[0]
        self._space_keys[key] = space
        return space

    def find_space(self, key: int) -> int | None:
        """Return the space that an `add_space` made whose caller was interrupted."""
        return self._space_keys.get(key)

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd."""
        self._engine.remove_space(space)
        if space in self._space_fds:
            os.close(self._space_fds.pop(space))

    def add(self, serving: Serving, fds: list[int]) -> RangeId:
        """Serve a range."""
        try:
            content, local = _open(serving, fds, retry=False)
            served = self._add(serving.space, serving, content, local, states_fd=fds[-1])
        finally:
            _wire.close_all(fds)
        self._served[served.number] = served
        return served

    def _add(
        self,
        space: int,
        serving: Serving,
        content: Content,
        local: mmap.mmap | None,
        *,
        states_fd: int = -1,
        taken: Taken | None = None,
    ) -> RangeId:
        spec = RangeSpec(
            space,
            serving.start,
            serving.length,
            serving.page_size,
            serving.mode,
            content,
            local=_memory.buffer_address(local)[0] if local is not None else 0,
            writes_cache=serving.writes_cache,
            maps_holes=serving.maps_holes,
            shared=serving.shared,
            owner=local,
            label=serving.label,
        )
        return self._engine.add(spec, states_fd=states_fd, taken=taken)

    def unserve(
        self, served: RangeId, seal: bool, unregister: bool, patience_s: float, gently: bool
    ) -> bool:
        """Take a range out."""
        done = self._engine.unserve(
            served, seal=seal, unregister=unregister, patience_s=patience_s, gently=gently
        )
        if done:
            self._served.pop(served.number, None)
        return done

    def abandon(self, served: RangeId | None, failed: bool) -> None:
        """Poison the pages that wait for a source."""
        self._engine.abandon(served, failed=failed)

    def stats(self) -> object:
        """Return the counters, of earlier workers as well."""
        return dataclasses.replace(self._engine.stats(), restarts=self._restarts)

    def failure(self) -> Failure | None:
        """Return what went wrong; the death of workers comes first."""
        failure = self._engine.failure()
        if not self._gave_up:
            return failure
        pages = self._engine.stats().poisoned_pages
        return Failure(pages, 0, 0, errno.EOWNERDEAD, FailureStage.SOURCE)

    def spaces(self) -> int:
        """Return how many address spaces are followed."""
        return self._engine.spaces

    def owner_exited(self) -> bool:
        """Return whether the process whose memory is served is gone."""
        return self._engine.owner_exited

    def _seal_all(self) -> None:
        """Nobody is left to serve for: forks and other processes get SIGBUS, not zeros."""
        self._engine.refuse()
        self._engine.abandon()
        for served in list(self._served.values()):
            try:
                self._engine.unserve(served, seal=True, unregister=False)
            except UffdOSError as error:
                log.debug("%s", error)


class _LostSource:
    """Stands for a source that the successor of a dead worker could not load."""

    length = None

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, offset: int, length: int) -> Buffer:
        """Raise what loading it raised."""
        raise OSError(errno.EIO, f"the page source is lost: {self._error}") from self._error


def _load(packed: PackedSource, *, retry: bool) -> PageSource:
    try:
        return unpack(packed)
    except ValueError as error:
        if retry:
            return _LostSource(error)
        raise


def _unread(serving: Serving) -> Content:
    if serving.kind in (SourceKind.ZERO, SourceKind.NONE):
        return Content(serving.kind)
    return Content(SourceKind.REQUEST, owner=_LostSource(OSError(errno.EIO, "not read any more")))


def _open(serving: Serving, fds: list[int], *, retry: bool) -> tuple[Content, mmap.mmap | None]:
    """Return the content, and the serving's memory mapped here where that is needed."""
    files = list(fds)
    content = Content(
        serving.kind,
        fd=files.pop(0) if serving.has_source_fd else -1,
        offset=serving.source_offset,
        length=serving.source_length,
        owner=_load(serving.source, retry=retry) if serving.source else None,
    )
    if serving.local_offset < 0:
        return content, None
    local = mmap.mmap(files[0], serving.length, mmap.MAP_SHARED, offset=serving.local_offset)
    return content, local
