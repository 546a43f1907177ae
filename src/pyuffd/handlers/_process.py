"""The engine in a helper process, as the owner of the memory sees it (layer L4).

Two processes stand behind it: the keeper (`_helper`) and its fork, the worker
(`_worker_process`), which runs the engine and the page sources. Calls go over one socket and are
answered in any order; a thread reads the answers. Nothing here is needed to resolve a fault.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Unpack

from pyuffd._closing import SoleOwner
from pyuffd._errors import HandlerError
from pyuffd.handlers import _wire
from pyuffd.handlers._backend import EngineOptions, SourceFailure
from pyuffd.handlers._engine import (
    PATIENCE_S,
    Ended,
    Failure,
    HandlerStats,
    RangeId,
    RangeSpec,
    RecentFault,
    SourceKind,
)
from pyuffd.handlers._transport import pack
from pyuffd.handlers._worker_process import Serving

log = logging.getLogger(__name__)

# The helper seals what is left and joins its threads; then it goes, or is killed.
EXIT_LIMIT_S = 15.0
# Found however this process found it; without the working directory, whose files may shadow others.
_PROGRAM = (
    "import sys; sys.path.append({root!r}); from pyuffd.handlers._helper import main;"
    " main({fd}, {pid})"
)


class HelperLostError(HandlerError):
    """The helper process is gone: it was killed, or could not start."""


class RemoteEngine(SoleOwner):
    """A `Backend` in another process; `workers` threads there call the page sources."""

    calls_python = True
    is_remote = True
    _instead = "it is a process of this one"

    def __init__(self, fd: int, *, workers: int, **options: Unpack[EngineOptions]) -> None:
        self._calls: dict[int, _Call] = {}
        self._lock = threading.Lock()  # guards the above, `_next`, `_lost` and sending
        self._next = 1
        self._lost = False
        self._socket, theirs = socket.socketpair()
        try:
            self._process = _start(theirs)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._reader = threading.Thread(target=self._read, name=f"uffd-p{fd}", daemon=True)
        self._reader.start()
        try:
            with self._lock, contextlib.suppress(OSError):
                _wire.send(self._socket, (options, workers, sys.path), (fd,))
            self._call("hello")
        except BaseException:
            self._end()
            raise

    # Calls

    def _call(self, name: str, *args: object, fds: tuple[int, ...] = ()) -> Any:
        call = _Call()
        payload = pickle.dumps(args)
        with self._lock:
            if self._lost:
                raise self._lost_error()
            number, self._next = self._next, self._next + 1
            self._calls[number] = call
            with contextlib.suppress(OSError):  # the reader sees that it is gone, and says so
                _wire.send(self._socket, (number, name, payload), fds)
        call.done.wait()
        if call.payload is None:
            raise self._lost_error()
        if not call.ok:
            raise _wire.load_error(call.payload)
        return pickle.loads(call.payload)

    def _lost_error(self) -> HelperLostError:
        return HelperLostError(
            f"the helper process {self._process.pid} is gone: what is missing stays missing until"
            " stop() poisons it"
        )

    def _read(self) -> None:
        while True:
            try:
                (number, ok, payload), _ = _wire.receive(self._socket)
            except EOFError:
                break
            if number:
                with self._lock:
                    call = self._calls.pop(number)
                call.ok, call.payload = ok, payload
                call.done.set()
            else:
                log.warning(
                    "a worker process died, another took over%s",
                    ": it poisons what is asked for" if pickle.loads(payload) else "",
                )
        with self._lock:
            self._lost = True
            calls, self._calls = self._calls, {}
        for call in calls.values():
            call.done.set()

    # What a Handler calls

    def add_space(self, fd: int, *, has_events: int) -> int:
        """Serve another userfaultfd as well."""
        return int(self._call("add_space", has_events, fds=(fd,)))

    def remove_space(self, space: int) -> None:
        """Forget it."""
        self._call("remove_space", space)

    def add(self, spec: RangeSpec) -> RangeId:
        """Put a range in; what it needs of this process is sent."""
        content = spec.content
        if content.kind is SourceKind.MEMORY:
            raise ValueError(
                f"{content.owner!r} lies in this process, where the helper process cannot read"
                " it: put it into a memfd and serve a FileSource, or use driver='thread'"
            )
        if spec.preserve:
            raise ValueError(
                "preserve= is memory of this process, where the helper process cannot write:"
                " serve that region with another Handler, of driver='native'"
            )
        fds = (content.fd,) if content.kind is SourceKind.FILE else ()
        source = pack(content.owner) if content.kind is SourceKind.REQUEST else None
        served: RangeId = self._call(
            "add",
            Serving(
                spec.space,
                spec.start,
                spec.length,
                spec.page_size,
                spec.mode,
                content.kind,
                source,
                content.offset,
                content.length,
                spec.local_file[1] if spec.local_file else -1,
                spec.writes_cache,
                spec.shared,
            ),
            fds=fds + ((spec.local_file[0],) if spec.local_file else ()),
        )
        return served

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Tell which ioctls the registered range takes."""
        self._call("set_ioctls", served, int(ioctls))

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Take a range out."""
        self._call("unserve", served, seal, unregister, patience_s)

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""
        self._call("start", cpus)

    def end(self, patience_s: float) -> Ended:
        """Take out every range and end the driver; wait so long for whoever is held up."""
        ended: Ended = self._call("end", patience_s)
        return ended

    def hurry(self, patience_s: float) -> None:
        """From any thread: let drain and end wait no longer than this."""
        self._call("hurry", patience_s)

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; False when the time ran out."""
        return bool(self._call("drain", limit_ns))

    def refuse(self) -> None:
        """Poison what is asked for from now on."""
        self._call("refuse")

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker; note it as a failure."""
        self._call("abandon", served, failed)

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages; return the bytes filled."""
        return int(self._call("populate", served, offset, length, chunk))

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Save protected pages: there are none, `add` has no preserve."""
        raise ValueError(f"the range at {served.start:#x} was served without preserve=")

    def writeprotect(self, served: RangeId, offset: int, length: int, pages: int) -> bytes:
        """Write-protect pages; return their states as they were when they were protected."""
        return bytes(self._call("writeprotect", served, offset, length, pages))

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""
        return bytes(self._call("states", served, first_page, pages))

    @property
    def spaces(self) -> int:
        """Address spaces that are followed."""
        return int(self._call("spaces"))

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served is gone."""
        return bool(self._call("owner_exited"))

    @property
    def source_failure(self) -> SourceFailure | None:
        """What a source raised first."""
        found = self._call("source_failure")
        if found is None:
            return None
        blob, start, length = found
        return SourceFailure(_wire.load_error(blob), start, length)

    def stats(self) -> HandlerStats:
        """Sum up the counters."""
        stats: HandlerStats = self._call("stats")
        return stats

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last."""
        return list(self._call("recent"))

    def failure(self) -> Failure | None:
        """Return what went wrong, or None."""
        failure: Failure | None = self._call("failure")
        return failure

    def pids(self) -> tuple[int, int]:
        """Return the process ids of the keeper and of the worker."""
        keeper, worker = self._call("pids")
        return keeper, worker

    def destroy(self) -> None:
        """End the helper process."""
        with contextlib.suppress(HelperLostError), self._lock, contextlib.suppress(OSError):
            _wire.send(self._socket, (self._next, "close", pickle.dumps(())))
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            log.warning("the helper process %d does not end: it is killed", self._process.pid)
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._socket.close()


class _Call:
    """A call that waits for its answer; `payload` stays None when the helper is gone."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.ok = False
        self.payload: bytes | None = None


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start the keeper; vfork(2) copies no memory, so no EVENT_FORK has to be read for it."""
    root = str(Path(__file__).resolve().parents[2])
    program = _PROGRAM.format(root=root, fd=theirs.fileno(), pid=os.getpid())
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
