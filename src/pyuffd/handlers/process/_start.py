"""Starting the helper process whatever state the program is in, and how it ended (layer L4)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyuffd import _limits
from pyuffd._errors import HandlerError, limit_met
from pyuffd._owned import Descriptor

STDIO = 3  # 0, 1 and 2 are the helper's standard streams, whatever they are here
# A worker and a holder end at once; what a page source had started may live on.
ORPHANS_LIMIT_S = 1.0
ORPHANS_POLL_S = 0.005
_SESSION = 3  # the field of /proc/PID/stat, behind the name

# Start this copy of pyuffd, whatever the helper would find; what it needs is where we found it.
# Without the folder of the script or the working directory, whose files may shadow others.
_PROGRAM = """\
import sys
from importlib import util
sys.path += [entry for entry in {path!r} if entry not in sys.path]
spec = util.spec_from_file_location("pyuffd", {package!r})
sys.modules["pyuffd"] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pyuffd"])
from pyuffd.handlers.process._keeper import main
main({fd}, {pid}, {stderr})
"""


class HelperLostError(HandlerError):
    """The helper process is gone: it was killed, or could not start."""


class HelperProcess:
    """The keeper, as the process that started it sees it.

    Attributes: `pid`; `pidfd`, readable when it has ended; `socket`, our end of the connection.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what follows
        self._how = ""
        self._said = Descriptor()
        self._pidfd = Descriptor()
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `undo_start` when that fails, or whoever wanted it is interrupted."""
        with starting("socketpair"):
            self.socket, theirs = _socketpair()
        with theirs, _standard_error() as stderr:
            self._open_said()
            self._popen = self._start(theirs.fileno(), stderr.number)
        self.pid = self._popen.pid
        with starting("pidfd_open"):
            self._pidfd = Descriptor.of_process(self.pid)

    @property
    def pidfd(self) -> int:
        """Readable when it has ended; -1 where there is none."""
        return self._pidfd.number

    def _start(self, fd: int, stderr: int) -> subprocess.Popen[bytes]:
        """Start an interpreter; vfork(2) copies no memory, so no EVENT_FORK has to be read for it.

        It starts clean (`_clean`), as it inherits which signals are ignored and blocked.
        """
        program = _PROGRAM.format(
            path=[entry for entry in sys.path if entry],
            package=sys.modules["pyuffd"].__file__,
            fd=fd,
            pid=os.getpid(),
            stderr=stderr,
        )
        with starting("vfork"):
            return subprocess.Popen(
                [_interpreter(), *_flags(), "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=None if is_inherited(1) else subprocess.DEVNULL,
                stderr=self._said.number if self._said.is_open else _inherited_or_null(2),
                pass_fds=[fd, stderr] if stderr >= 0 else [fd],
                start_new_session=True,
            )

    def undo_start(self) -> None:
        """End what may have been started, without a word."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        self.close()

    # What it says while it starts

    def _open_said(self) -> None:
        with contextlib.suppress(OSError):  # it says it to our standard error then
            self._said = Descriptor.memfd("uffd-helper-stderr", os.MFD_CLOEXEC)

    @property
    def said(self) -> str:
        """What it wrote to its standard error before it was ready."""
        if not self._said.is_open:
            return ""
        size = os.fstat(self._said.number).st_size
        return os.pread(self._said.number, size, 0).decode(errors="replace").strip()

    def is_ready(self) -> None:
        """Pass on what it said."""
        if (said := self.said) and sys.stderr is not None:
            print(said, file=sys.stderr)
        self._said.close()

    # Its end

    def ended(self, limit_s: float) -> bool:
        """Wait for its end, so long at most."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def how(self) -> str:
        """Reap it when it has ended, and say how it did."""
        with self._lock:
            if not self._how:
                self._how = self._reap()
            return self._how

    def _reap(self) -> str:
        status: Any = None
        with contextlib.suppress(ChildProcessError):
            status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        if self._popen is not None:
            self._popen.poll()  # it is gone, whatever that says
        self._reap_orphans()
        if status is None:
            # SIGCHLD is ignored here, or some code waits for all children.
            how = "has ended; how is unknown, as this program waits for it in its place"
        elif status.si_code == os.CLD_EXITED:
            how = f"has ended with exit code {status.si_status}"
        else:
            how = f"was killed by {signal_name(status.si_status)}"
            if status.si_status == signal.SIGKILL:
                how += " (by somebody, or by the kernel for want of memory: see dmesg)"
        lines = self.said.splitlines()
        if not lines:
            return how
        # Interpreters say this in many ways.
        memory = any(word in lines[-1].lower() for word in ("memory", "failed to map"))
        hint = _limits.why(errno.ENOMEM, "mmap") if memory else ""
        return f"{how}; its last words: {lines[-1]}" + (f"; {hint}" if hint else "")

    def _reap_orphans(self) -> None:
        """Reap its children, which are ours if this process is the one that orphans go to.

        They end when the keeper does, and are of the session that it began.
        """
        give_up = time.monotonic() + ORPHANS_LIMIT_S
        while (orphans := _children_of_session(self.pid)) and time.monotonic() < give_up:
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(ORPHANS_POLL_S)

    def close(self) -> None:
        """Close what leads to it, after its end; twice is fine."""
        if hasattr(self, "socket"):
            self.socket.close()
        self._said.close()
        self._pidfd.close()


def _children_of_session(session: int) -> list[int]:
    """Return which children of this process belong to a session."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread that has ended
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                with contextlib.suppress(OSError):
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                    if int(stat[_SESSION]) == session:
                        found.append(int(pid))
    return found


def signal_name(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def cannot_start(cause: str) -> HelperLostError:
    """Return the error of a helper that never was."""
    return HelperLostError(f"the helper process could not be started: {cause}")


@contextlib.contextmanager
def starting(call: str) -> Iterator[None]:
    """Name the system call that fails, and the limit it met."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        code = (isinstance(error, OSError) and error.errno) or 0
        file = getattr(error, "filename", None)
        # Popen raises what vfork(2) says, and what the child says, which names the file.
        hint = limit_met(code) if file else _limits.why(code, call)
        text = os.strerror(code) if code else str(error)
        raise cannot_start(f"{file or call}: {text}" + (f"; {hint}" if hint else "")) from error


def _socketpair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    try:
        return _above_stdio(ours), _above_stdio(theirs)  # what is printed here goes to neither
    except BaseException:
        ours.close()
        theirs.close()
        raise


def _above_stdio(sock: socket.socket) -> socket.socket:
    """Move a socket that has the number of a standard stream."""
    if sock.fileno() >= STDIO:
        return sock
    with sock, Descriptor.duplicate(sock.fileno(), STDIO) as descriptor:
        return socket.socket(fileno=descriptor.release())


def _standard_error() -> Descriptor:
    """Give a number to our standard error that the helper can use when it is ready, if any."""
    if not is_inherited(2):
        return Descriptor()
    with starting("fcntl"):
        return Descriptor.duplicate(2, STDIO)


def is_inherited(fd: int) -> bool:
    """Whether a standard stream is open; what closes at exec(2) has its number by accident."""
    try:
        return not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False


def _inherited_or_null(fd: int) -> int | None:
    return None if is_inherited(fd) else subprocess.DEVNULL


def _interpreter() -> str:
    """Return the interpreter that multiprocessing would start."""
    spawn: Any = sys.modules.get("multiprocessing.spawn")
    found = os.fsdecode((spawn.get_executable() if spawn else sys.executable) or "")
    # A frozen program is its own interpreter, and would run itself.
    if not found or (getattr(sys, "frozen", False) and found == sys.executable):
        raise cannot_start(
            f"the driver starts a Python interpreter, and sys.executable is {found!r}, of a program"
            " that is frozen or embeds Python: name one by"
            " multiprocessing.spawn.set_executable(), or use driver='thread'"
        )
    return found


def _flags() -> list[str]:
    """Return the options of this interpreter, as multiprocessing does."""
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    return flags
