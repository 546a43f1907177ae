"""Start the keeper process in whatever state the program is, and tell how it ended (layer L4)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyuffd import _limits
from pyuffd._describe import counted
from pyuffd._errors import HelperLostError, limit_met
from pyuffd._latch import RLock
from pyuffd._owned import Descriptor
from pyuffd._polling import Poll
from pyuffd._stdio import STDIO, socketpair_above_stdio

# Worker process and holder end at once; processes that a page source started may live longer.
ORPHANS_LIMIT_S = 1.0
ORPHANS_POLL_S = 0.005
_SESSION = 3  # the field of /proc/PID/stat, counted after the name

# Start this copy of pyuffd, not another that the helper would find, with our sys.path after its
# own. The folder of the script and the working directory are left out: their files may shadow
# others.
_PROGRAM = """\
import sys
from importlib import util
sys.path += [entry for entry in {path!r} if entry not in sys.path]
spec = util.spec_from_file_location("pyuffd", {package!r})
sys.modules["pyuffd"] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pyuffd"])
from pyuffd.handlers.process._keeper import main
main({fd}, {pid}, {stderr}, {life})
"""


class HelperProcess:
    """The keeper, as seen by the process that started it.

    Attributes: `pid`; `pidfd`, readable when it has ended; `socket`, our end of the connection.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # guards the members below
        self._how = ""
        self._oom_kills = _limits.oom_kills()
        self._said = Descriptor()
        self._pidfd = Descriptor()
        self._life = Descriptor()
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; the caller calls `undo_start` after a failure or an interruption."""
        with starting("socketpair"):
            self.socket, theirs = socketpair_above_stdio()
        with starting("pipe2"):
            self._life, life = Descriptor.pipe(STDIO)
        with theirs, life, _standard_error() as stderr:
            self._open_said()
            self._popen = self._start(theirs.fileno(), stderr.number, life.number)
        self.pid = self._popen.pid
        with starting("pidfd_open"):
            self._pidfd = Descriptor.of_process(self.pid)

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable when the keeper has ended; -1 without a keeper."""
        return self._pidfd.number

    @property
    def life(self) -> int:
        """The read end of a pipe that is closed when no process of the helper is left."""
        return self._life.number

    def _start(self, fd: int, stderr: int, life: int) -> subprocess.Popen[bytes]:
        """Start an interpreter. subprocess uses vfork(2), which causes no Fork event.

        The interpreter inherits the ignored and blocked signals, which `_clean` resets.
        """
        program = _PROGRAM.format(
            path=[entry for entry in sys.path if entry],
            package=sys.modules["pyuffd"].__file__,
            fd=fd,
            pid=os.getpid(),
            stderr=stderr,
            life=life,
        )
        with starting("vfork"):
            return subprocess.Popen(
                [_interpreter(), *_flags(), "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=None if is_inherited(1) else subprocess.DEVNULL,
                stderr=self._said.number if self._said.is_open else _inherited_or_null(2),
                pass_fds=[fd, life, stderr] if stderr >= 0 else [fd, life],
                start_new_session=True,
            )

    def undo_start(self) -> None:
        """End the process if it was started, without a message."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        self.close()

    # What it writes while it starts

    def _open_said(self) -> None:
        with contextlib.suppress(OSError):  # without the memfd it writes to our standard error
            self._said = Descriptor.memfd("uffd-helper-stderr", os.MFD_CLOEXEC)

    @property
    def said(self) -> str:
        """The text that it wrote to its standard error before it was ready."""
        if not self._said.is_open:
            return ""
        size = os.fstat(self._said.number).st_size
        return os.pread(self._said.number, size, 0).decode(errors="replace").strip()

    def is_ready(self) -> None:
        """Write to our standard error what it wrote while it started."""
        if (said := self.said) and sys.stderr is not None:
            print(said, file=sys.stderr)
        self._said.close()

    # Its end

    def ended(self, limit_s: float) -> bool:
        """Wait at most `limit_s` for its end; return whether it has ended."""
        poll = Poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def kill(self) -> bool:
        """End it, or find that it has ended; return False if this process may not.

        It keeps the user that it was started by, where this process has become another one.
        """
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return True
        except PermissionError:  # also of a process that has ended and was not reaped
            return self.ended(0)
        return True

    def how(self) -> str:
        """Reap it after it has ended, and return in words how it ended."""
        with self._lock:
            if not self._how:
                self._how = self._reap()
            return self._how

    def _reap(self) -> str:
        status: Any = None
        with contextlib.suppress(ChildProcessError):
            status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        if self._popen is not None:
            self._popen.poll()  # only to tell Popen that the process has ended
        self._reap_orphans()
        if status is None:
            # SIGCHLD is ignored in this process, or other code waits for all children.
            how = "has ended; how is unknown, as other code of this program has reaped it"
        elif status.si_code == os.CLD_EXITED:
            how = f"has ended with exit code {status.si_status}"
        else:
            how = how_killed(status.si_status, self._oom_kills)
        lines = self.said.splitlines()
        if not lines:
            return how
        # Interpreters word a lack of memory in many ways.
        memory = any(word in lines[-1].lower() for word in ("memory", "failed to map"))
        hint = _limits.why(errno.ENOMEM, "mmap") if memory else ""
        return f"{how}; its last words: {lines[-1]}" + (f"; {hint}" if hint else "")

    def _reap_orphans(self) -> None:
        """Reap its children, which become ours if this process is a child subreaper.

        They end when the keeper does, and belong to the session that it created.
        """
        give_up = time.monotonic() + ORPHANS_LIMIT_S
        while (orphans := _children_of_session(self.pid)) and time.monotonic() < give_up:
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(ORPHANS_POLL_S)

    def close(self) -> None:
        """Close the connection to it after its end; may be called again."""
        if hasattr(self, "socket"):
            self.socket.close()
        self._said.close()
        self._pidfd.close()
        self._life.close()


def _children_of_session(session: int) -> list[int]:
    """Return the children of this process that belong to a session."""
    found: list[int] = []
    tasks: list[str] = []
    with contextlib.suppress(OSError):  # after chroot(2) there may be no /proc
        tasks = os.listdir("/proc/self/task")
    for task in tasks:
        with contextlib.suppress(OSError):  # a thread that has ended
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                with contextlib.suppress(OSError):
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                    if int(stat[_SESSION]) == session:
                        found.append(int(pid))
    return found


def how_killed(number: int, oom_kills: int) -> str:
    """Return in words how a process was killed; `oom_kills` counted those before it began."""
    how = f"was killed by {_signal_name(number)}"
    if number != signal.SIGKILL:
        return how
    now = _limits.oom_kills()
    if oom_kills < 0 or now < 0:
        return f"{how} (by another process, or by the kernel for lack of memory: see dmesg)"
    if now == oom_kills:
        return f"{how} (by a process, perhaps itself, and not by the kernel for lack of memory)"
    killed = counted(now - oom_kills, "process", "processes")
    return f"{how} (the kernel has killed {killed} for lack of memory meanwhile: see dmesg)"


def _signal_name(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def cannot_start(cause: str) -> HelperLostError:
    """Return the error for a helper process that could not be started."""
    return HelperLostError(f"the helper process could not be started: {cause}")


@contextlib.contextmanager
def starting(call: str) -> Iterator[None]:
    """Raise an error that names the system call that fails, and the limit that it met."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        code = (isinstance(error, OSError) and error.errno) or 0
        file = getattr(error, "filename", None)
        # Popen raises errors of vfork(2), and those of the child, which name the file.
        hint = limit_met(code) if file else _limits.why(code, call)
        text = os.strerror(code) if code else str(error)
        raise cannot_start(f"{file or call}: {text}" + (f"; {hint}" if hint else "")) from error


def _standard_error() -> Descriptor:
    """Duplicate our standard error, if any, for the helper to use when it is ready."""
    if not is_inherited(2):
        return Descriptor()
    with starting("fcntl"):
        return Descriptor.duplicate(2, STDIO)


def is_inherited(fd: int) -> bool:
    """Return whether a standard stream is open; a close-on-exec file has its number by chance."""
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
    # The interpreter of a frozen program is the program itself, which would run again.
    if not found or (getattr(sys, "frozen", False) and found == sys.executable):
        raise cannot_start(
            f"the driver must start a Python interpreter, but sys.executable is {found!r}, as in a"
            " program that is frozen or embeds Python: set one with"
            " multiprocessing.spawn.set_executable(), or use driver='thread'"
        )
    return found


def _flags() -> list[str]:
    """Return the command-line options of this interpreter, as multiprocessing does."""
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    return flags
