"""A process that faults on command, one step at a time."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from pyuffd._abi import Feature, RegisterMode
from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError, HandoverError, UffdError
from pyuffd._uffd import Event, Userfaultfd
from pyuffd.handover import Handover, HandoverRange, recv_uffd
from pyuffd.testing import _wire
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryName

Command = Literal["read", "write", "touch", "madvise", "munmap", "mremap", "fork", "exit"]

_COMMANDS = ("read", "write", "touch", "madvise", "munmap", "mremap", "fork", "exit")

# Interpreter start and imports take seconds on a loaded machine with a sanitizer.
START_S = 30.0
STEP_S = 10.0  # reached only if there is a bug: a step whose faults are resolved ends at once


class FaultingChildError(UffdError):
    """A step failed in the child, or the child ended.

    Attributes: `errno`, the error of the step's system call, or None; `returncode`, how the child
    ended (negative: the signal), or None if it is alive.
    """

    errno: int | None
    returncode: int | None

    def __init__(self, text: str, errno: int | None = None, returncode: int | None = None) -> None:
        """Keep the errno and the return code with the text."""
        super().__init__(text, errno, returncode)
        self.errno = errno
        self.returncode = returncode

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class ForkResult:
    """How a fork of the child ended.

    Attributes:
        pid: Its process id; it has been reaped.
        returncode: Exit status, or the negative number of the signal that ended it.
        value: The result of its command; None after a signal.
    """

    pid: int
    returncode: int
    value: Any


class Step(SoleOwner):
    """A running command of a `FaultingChild`; made by `begin`."""

    _instead = "its child is a process of this one"

    def __init__(self, child: FaultingChild, number: int, command: Command) -> None:
        self._child = child
        self._number = number
        self.command = command

    @property
    def running(self) -> bool:
        """Whether it is still running: it waits for a page, or for an event to be read."""
        self._child._receive(0)
        return not self._child._is_over(self._number)

    def done(self, timeout_s: float = STEP_S) -> Any:
        """Wait for its end and return its value; may be called again after TimeoutError.

        Raises:
            TimeoutError: it is still running.
            FaultingChildError: it failed, or the child has ended.
        """
        deadline = time.monotonic() + timeout_s
        while not self._child._is_over(self._number):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.command} still waits after {timeout_s} s")
            self._child._receive(left)
        return self._child._result(self._number, self.command)

    def __repr__(self) -> str:
        state = "over" if self._child._is_over(self._number) else "running"
        return f"<Step {self._number} {self.command} {state}>"


class FaultingChild(SoleOwner):
    """A Python process with a region, which sends its userfaultfd to the test.

    It runs the test's commands, one after the other or in several threads, and waits in the kernel
    until the test resolves its faults. It keeps no copy of the userfaultfd.

    Args:
        pages: Pages in the region.
        memory: anon, shmem, shmem-private, hugetlb or hugetlb-private.
        mode: How the child registers the region; None leaves that to the test.
        features: Features of the userfaultfd.
        content: Bytes written to the start of the region before it is registered; the other pages
            stay missing.
        user_mode_only: As for `Userfaultfd`.
        env: Environment variables to add.

    Attributes:
        pid: Its process id.
        uffd: The userfaultfd for the child's memory.
        region: Where that memory is; `region.fd` is the memfd behind it, or None.

    Commands of `begin` and `run`, with offsets from the start of the region:

    - `"read", offset, length` returns bytes; `"write", offset, data`;
    - `"touch", offset, length=1`, keyword `write=True` for write accesses, one in each page;
    - `"madvise", advice, offset, length`; `"munmap", offset, length`;
    - `"mremap", offset, length` moves pages and returns their new address, for `base=`;
    - `"fork", command, ...` runs a command in a fork, and returns a `ForkResult` when it ends;
      without a command the fork exits at once;
    - `"exit", status` ends the child.

    Raises:
        ValueError: bad arguments.
        FaultingChildError: the child failed to start: no privilege, no huge pages, ...

    GIL: the child's accesses do not hold its GIL; its forks do.  Threads: use it in one thread of
    the test.  Blocks: no longer than the timeouts.

    Example:
        >>> from pyuffd.testing import FaultingChild
        >>> with FaultingChild(pages=2) as child:
        ...     step = child.begin("read", 4096, 5)
        ...     event = child.next_event()
        ...     result = child.uffd.fill_copy(event.address, b"hello".ljust(4096, b"."))
        ...     step.done()
        b'hello'
    """

    _instead = "it is a process of this one; start another"

    def __init__(
        self,
        pages: int = 4,
        *,
        memory: MemoryName = "anon",
        mode: RegisterMode | None = RegisterMode.MISSING,
        features: Feature = Feature(0),  # noqa: B008 - an immutable flag
        content: bytes = b"",
        user_mode_only: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if pages < 1:
            raise ValueError(f"pages {pages} must be above zero")
        if memory not in MEMORY_TYPES:
            raise ValueError(f"memory {memory!r} is none of {(*MEMORY_TYPES,)}")
        self._buffer = bytearray()
        self._replies: dict[int, dict[str, Any]] = {}
        self._steps: list[Step] = []
        self._ended = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._socket = ours
            # In a new process group, so that the child and its forks can be killed together.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pyuffd.testing._child_main", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.pid: int = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        order = {
            "memory": memory,
            "pages": pages,
            "mode": int(mode or 0),
            "features": int(features),
            "content": _wire.portable(content),
            "user_mode_only": user_mode_only,
        }
        self._handover: Handover | None = None
        try:
            self._handover = self._start(order)
        except BaseException:
            self.close()
            raise
        self.uffd: Userfaultfd = self._handover.uffd
        self.region: HandoverRange = self._handover.regions[0]

    def _start(self, order: dict[str, Any]) -> Handover:
        self._socket.settimeout(START_S)
        with suppress(ConnectionError):  # the read below reports more
            self._socket.sendall(_wire.packed(order))
        # Byte by byte: the handover and its descriptors follow the reply.
        reply = None
        while reply is None:
            try:
                data = self._socket.recv(1)
            except TimeoutError as error:
                raise FaultingChildError(f"the child is not ready after {START_S} s") from error
            except ConnectionError:
                data = b""
            if not data:
                raise FaultingChildError(
                    "the child ended before it was ready", returncode=self.wait()
                )
            self._buffer += data
            reply = _wire.unpacked(self._buffer)
        if "error" in reply:
            raise FaultingChildError(reply["error"], reply["errno"])
        self._socket.settimeout(None)
        try:
            return recv_uffd(self._socket, allow_uids=[os.geteuid()], timeout_s=START_S)
        except HandoverError as error:
            raise FaultingChildError(f"the child did not hand over: {error}") from error

    def begin(
        self,
        command: Command,
        *args: int | bytes | str,
        base: int | None = None,
        thread: int = 0,
        **options: bool,
    ) -> Step:
        """Begin a command in the child, and return at once.

        Args:
            command: See the class.
            *args: Its arguments.
            base: Count offsets from this address of the child instead.
            thread: The thread of the child that runs it; each thread runs one step at a time.
            **options: The command's keywords.
        """
        if command not in _COMMANDS:
            raise ValueError(f"command {command!r} is none of {_COMMANDS}")
        self._running()
        step = Step(self, len(self._steps), command)
        order = {
            "id": step._number,
            "command": command,
            "args": [_wire.portable(arg) for arg in args],
            "base": base,
            "thread": thread,
            "options": options,
        }
        try:
            self._socket.sendall(_wire.packed(order))
        except ConnectionError as error:
            text = f"the child ended before {command}"
            raise FaultingChildError(text, returncode=self.wait()) from error
        self._steps.append(step)
        return step

    def done(self, timeout_s: float = STEP_S) -> Any:
        """Wait for the end of the latest step; see `Step.done`."""
        if not self._steps:
            raise ValueError("no step has begun")
        return self._steps[-1].done(timeout_s)

    def run(
        self,
        command: Command,
        *args: int | bytes | str,
        base: int | None = None,
        thread: int = 0,
        timeout_s: float = STEP_S,
        **options: bool,
    ) -> Any:
        """Begin a step and wait for its end; for steps without faults, or that a handler serves."""
        return self.begin(command, *args, base=base, thread=thread, **options).done(timeout_s)

    def next_event(self, timeout_s: float = STEP_S) -> Event:
        """Wait for the next event of the userfaultfd, and return only that one.

        Raises:
            TimeoutError: none arrived in time.
        """
        deadline = time.monotonic() + timeout_s
        while not (events := self.uffd.read_events(1)):
            left = deadline - time.monotonic()
            poll = select.poll()
            poll.register(self.uffd, select.POLLIN)
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError(f"no event within {timeout_s} s")
        return events[0]

    def wait(self, timeout_s: float = STEP_S) -> int:
        """Wait for the child's end; return its exit status, or the negative number of a signal.

        Raises:
            TimeoutError: it has not ended in time.
        """
        process = self._running()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the child has not ended within {timeout_s} s") from error

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the child, wait for its end, and return what `wait` does."""
        self._running().send_signal(number)
        return self.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ClosedError("this child is closed")
        return self._process

    def close(self) -> None:
        """Kill the child and its forks, then close the userfaultfd and everything else."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            # Not reaped yet, so no other group has this id.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._ended = True
        self._socket.close()
        os.close(self._pidfd)
        if self._handover is not None:
            self._handover.close()

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<FaultingChild pid={getattr(self, 'pid', None)}>"

    # Replies

    def _is_over(self, number: int) -> bool:
        return number in self._replies or self._ended

    def _receive(self, timeout_s: float) -> None:
        """Read what the child has sent; wait for that, or for the child's end, up to a time."""
        if self._ended:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        # A fork of the child may keep the stream open, so watch the child too.
        poll.register(self._pidfd, select.POLLIN)
        ready = dict(poll.poll(timeout_s * 1000))
        while True:
            try:
                data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                self._ended = True
                break
            self._buffer += data
        self._ended |= self._pidfd in ready
        while (reply := _wire.unpacked(self._buffer)) is not None:
            self._replies[reply["id"]] = reply

    def _result(self, number: int, command: Command) -> Any:
        reply = self._replies.get(number)
        if reply is None:
            returncode = None if self._process is None else self.wait()
            if command == "exit" and returncode is not None and returncode >= 0:
                return returncode
            raise FaultingChildError(f"the child ended during {command}", returncode=returncode)
        if "error" in reply:
            raise FaultingChildError(reply["error"], reply["errno"])
        value = reply["value"]
        if command != "fork":
            return _wire.restored(value)
        if "error" in value:
            raise FaultingChildError(value["error"], value["errno"])
        return ForkResult(value["pid"], value["returncode"], _wire.restored(value.get("value")))
