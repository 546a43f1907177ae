"""`LazyPages`: the server that `criu restore --lazy-pages` connects to."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

from pyuffd._arguments import check_bools, check_int, check_path, check_seconds
from pyuffd._closing import Closing
from pyuffd._describe import described, log_error, short_repr
from pyuffd._errors import ClosedError, CriuError, UffdError
from pyuffd._latch import RLock
from pyuffd._limits import start_thread
from pyuffd._owned import Descriptor
from pyuffd._polling import Poll
from pyuffd._uffd import Userfaultfd
from pyuffd._unix_sockets import UnixListener, listen_unix
from pyuffd.criu._images import Images
from pyuffd.criu._page_server import RemotePages
from pyuffd.criu._remote import PageBroker
from pyuffd.criu._restore import (
    Restore,
    RestoreOptions,
    RestoreReport,
    ioctls_of_private_memory,
    usable_cpus,
)
from pyuffd.criu._restore_socket import RestoreSocket
from pyuffd.handlers import Handler

log = logging.getLogger(__name__)

SOCKET_NAME = "lazy-pages.socket"
# More threads than this only compete for the page tables' locks and the memory bus.
MOST_THREADS = 8
# Restores at the same time; more wait to be accepted.
MOST_RESTORES = 64
RECORD_S = 5.0
# Requests to a page server under way. Faults are asked for behind those that are under way.
REMOTE_WORKERS = 8
REMOTE_CHUNK = 128 << 10
# Demand faults of a second or so on a fast machine, until they are looked at.
LOGGED_FAULTS = 1 << 20


class LazyPages(Closing):
    """Serve the lazy pages of `criu restore --lazy-pages`, in place of `criu lazy-pages`.

    The restored processes run at once. Pages that they touch come first, and several threads fill
    the rest in the background; then nothing is left of it in the processes. A page whose content
    cannot be read is poisoned, so that its process gets SIGBUS: none reads zeros instead of data,
    also if processes of this server are killed.

    If a signal handler raises just as its `with` block ends, its socket and its spare process stay
    until the last reference to this object is gone.

    Args:
        images: The images, or their folder.
        work_dir: The folder in which CRIU looks for the socket (its option -W); that of the images
            by default.
        restores: How many restores to serve; 0 for any number, until stop(). The same images can be
            restored any number of times, one after the other or, in PID namespaces of their own, at
            once.
        threads: Threads that fill in the background; one for each CPU by default, up to 8.
        working_set: A file with the pages that an earlier restore touched first: they are filled
            first. If the file does not exist, or is one of other images, this restore writes it.
        record_s: How long a restore that writes the working set only answers faults, in seconds.
        page_server: Where the lazy pages are, if they are not in files here. The images must have
            been read with is_remote=True; a folder is. The caller closes it, after this object:
            one connection serves all restores.
        finished: Called with a `RestoreReport` at the end of each restore, in a thread of this
            server.

    Attributes:
        path: The socket.
        reports: The `RestoreReport` of each restore, in the order in which they began.

    Raises:
        CriuError: "image" - see `Images`. "restore" - another server listens at the socket.
        ValueError: a bad argument.
        OSError: the socket cannot be made.

    Kernel: userfaultfd(2), needs what CRIU needs.  GIL: not needed for a page.  Threads: stop() may
    be called by any.

    Example:
        Serve one restore, as `criu lazy-pages -D images` does::

            with LazyPages("images") as server:
                server.serve()
            print(server.reports[0].faults)
    """

    _failed = "closing the server of lazy pages failed"
    _instead = "it owns a socket and processes"

    def __init__(
        self,
        images: Images | str | os.PathLike[str],
        *,
        work_dir: str | os.PathLike[str] | None = None,
        restores: int = 1,
        threads: int | None = None,
        working_set: str | os.PathLike[str] | None = None,
        record_s: float = RECORD_S,
        page_server: RemotePages | None = None,
        finished: Callable[[RestoreReport], None] | None = None,
    ) -> None:
        is_remote = page_server is not None
        self._images = images if isinstance(images, Images) else Images(images, is_remote=is_remote)
        if self._images.is_remote != is_remote:
            raise ValueError(
                f"page_server={short_repr(page_server)}, but the images were read with is_remote="
                f"{self._images.is_remote}"
            )
        folder = self._images.folder if work_dir is None else check_path("work_dir", work_dir)
        self._limit = check_int("restores", restores, 0)
        if threads is not None:
            check_int("threads", threads, 1, 1024)
        self._threads = threads or min(usable_cpus(), MOST_THREADS)
        self._options = RestoreOptions(
            threads=self._threads,
            working_set=None if working_set is None else check_path("working_set", working_set),
            record_s=check_seconds("record_s", record_s),
            remote=None,
            ioctls=ioctls_of_private_memory(),
        )
        self._broker = None if page_server is None else PageBroker(page_server)
        if self._broker is not None:
            self._options = replace(self._options, remote=self._broker.source, chunk=REMOTE_CHUNK)
        self._finished = finished
        self.path: str = os.path.join(folder, SOCKET_NAME)
        self.reports: list[RestoreReport] = []
        self._running: dict[int, Restore] = {}
        self._lock = RLock()
        self._slots = threading.BoundedSemaphore(MOST_RESTORES)
        self._ended = Descriptor.eventfd()
        self._refusing = Descriptor.eventfd()
        self._spare: _Spare | None = None
        self._folder = Descriptor.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listener = _listen(self._folder, self.path)
        self._spare = self._new_spare()

    def serve(self) -> list[RestoreReport]:
        """Serve restores until there were as many as wanted, or until stop(); return the reports.

        Raises:
            ClosedError: closed before.

        GIL: released.  Blocks: until then.
        """
        self._check_usable()
        threads: list[threading.Thread] = []
        try:
            for number, sock in enumerate(self._accepted(), 1):
                thread = threading.Thread(
                    target=self._serve_one, args=(number, sock), name=f"criu-restore-{number}"
                )
                threads = [one for one in threads if one.is_alive()]
                threads.append(thread)
                start_thread(thread)
        finally:
            for thread in threads:
                thread.join()
        return self.reports

    def stop(self, *, now: bool = False) -> None:
        """Serve no more restores, and let serve() return once those that run are filled.

        Args:
            now: Do not wait for them: pages that have not been filled are poisoned.
        """
        check_bools(now=now)
        if not self._ended.is_open:
            return
        os.eventfd_write(self._refusing.number, 1)
        if now:
            os.eventfd_write(self._ended.number, 1)
            with self._lock:
                for restore in self._running.values():
                    restore.stop()

    def _accepted(self) -> Iterator[socket.socket]:
        """Yield connections."""
        accepted = 0
        while not self._limit or accepted < self._limit:
            poll = Poll()
            poll.register(self._listener.fileno(), select.POLLIN)
            poll.register(self._refusing.number, select.POLLIN)
            if any(fd == self._refusing.number for fd, _ in poll.poll()):
                return
            try:
                sock = self._listener.accept(timeout_s=0)
            except UffdError:  # the peer has gone again
                continue
            accepted += 1
            if accepted == self._limit:
                self._listener.close()  # as CRIU does: one more restore fails at once
            yield sock

    def _serve_one(self, number: int, sock: socket.socket) -> None:
        report = RestoreReport(number)
        with self._slots, sock, ExitStack() as stack:
            restore = Restore(
                report, self._images, partial(self._take_handler, number, stack), self._options
            )
            with self._lock:
                self.reports.append(report)
                self._running[number] = restore
            try:
                restore.run(RestoreSocket(sock, self._ended.number))
            except (UffdError, OSError) as error:
                report.error = report.error or str(error)
            except Exception as error:
                log_error(log, f"pyuffd: restore {number}", error)
                report.error = report.error or described(error)
            finally:
                with self._lock:
                    del self._running[number]
        if self._finished is not None:
            self._finished(report)

    def _take_handler(self, number: int, stack: ExitStack) -> Handler:
        """Return the prepared handler, which the stack closes, and prepare one for the next."""
        with self._lock:
            spare = self._spare or self._new_spare()
            self._spare = None if number == self._limit else self._new_spare()
        return stack.enter_context(spare).handler()

    def _new_spare(self) -> _Spare:
        log_size = LOGGED_FAULTS if self._options.working_set else 0
        return _Spare(log_size, REMOTE_WORKERS if self._broker is not None else 1)

    def _check_usable(self) -> None:
        if not self._ended.is_open:
            raise ClosedError("the server of lazy pages is closed")

    def close(self) -> None:
        """Stop now, and remove the socket."""
        self.stop(now=True)
        self._listener.close()
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        if self._broker is not None:
            self._broker.close()
        for descriptor in (self._ended, self._refusing, self._folder):
            descriptor.close()

    def __repr__(self) -> str:
        return f"<LazyPages at {self.path} of {self._images!r}>"


class _Spare(Closing):
    """A running handler for the next restore: its helper process needs a moment to start."""

    _failed = "stopping a handler failed"
    _instead = "it owns a handler"

    def __init__(self, fault_log: int, workers: int) -> None:
        self._fault_log = fault_log
        self._workers = workers
        self._handler: Handler | None = None
        self._uffd: Userfaultfd | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name="criu-handler")
        start_thread(self._thread)

    def _make(self) -> None:
        try:
            # Of this process, and for no memory: those of restored processes are added to it.
            self._uffd = Userfaultfd()
            self._handler = Handler(
                self._uffd,
                driver="process",
                workers=self._workers,
                fault_log=self._fault_log,
                stall_timeout_s=math.inf,  # RemotePages has a limit of its own
            )
            self._handler.start()
        except BaseException as error:
            self._error = error

    def handler(self) -> Handler:
        """Return it once it runs."""
        self._thread.join()
        if self._handler is None or self._error is not None:
            raise self._error or ClosedError("the handler has not started")
        return self._handler

    def close(self) -> None:
        """Stop it."""
        self._thread.join()
        try:
            if self._handler is not None:
                self._handler.stop()
        finally:
            if self._uffd is not None:
                self._uffd.close()


def _listen(folder: Descriptor, shown: str) -> UnixListener:
    """Listen in a folder, in place of a server that has ended without removing its socket."""
    try:
        fcntl.flock(folder.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CriuError("restore", f"another server listens at {shown}") from None
    # A path may be too long for a socket; CRIU uses the name within its working directory.
    path = f"/proc/self/fd/{folder.number}/{SOCKET_NAME}"
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    return listen_unix(path)
