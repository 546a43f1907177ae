"""Run code that may stall in a child process with a time limit.

A thread that faults while it holds the GIL stops every Python thread, so no timeout inside the
process can fire. The child arms `faulthandler`'s C watchdog, which needs no GIL, and the parent
sends SIGKILL if even that fails. A child is a new process, not a fork of this one, so it inherits
no lock, thread or userfaultfd.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pyuffd.testing._need import Lack, strict
from pyuffd.testing._skips import lack_of
from pyuffd.testing._user_mode import make_do

# For interpreter start and imports, which do not count against the budget of the code under test.
# Generous, because they take seconds on a loaded machine with a sanitizer.
STARTUP_S = 20.0
# How long after the child's watchdog the parent kills the child.
MARGIN_S = 3.0
# Sanitizer builds and slow machines set PYUFFD_BUDGET_SCALE to stretch every budget.
SCALE = float(os.environ.get("PYUFFD_BUDGET_SCALE", "1"))

# The name of a function: `package.module:function`. Everything else is source text.
DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PR_SET_PDEATHSIG = 1

Expect = int | Literal["timeout"] | None


@dataclass(frozen=True)
class ChildResult:
    """How a child ended, and its output.

    Attributes:
        returncode: exit status, or the negative number of the signal that ended it.
        stdout: what it printed.
        stderr: its error output, with all Python tracebacks if it ran out of time.
        timed_out: it exceeded its budget.
        elapsed_s: wall time including interpreter start.
        value: the result of the function, through JSON; None for source text.
    """

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    elapsed_s: float
    value: Any

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that ended the child, or None if it exited."""
        return signal.Signals(-self.returncode) if self.returncode < 0 else None

    def describe(self) -> str:
        """Return a report for an assertion message."""
        how = self.signal.name if self.signal else f"exit status {self.returncode}"
        late = ", out of time" if self.timed_out else ""
        return (
            f"child ended with {how}{late} after {self.elapsed_s:.1f} s\n"
            f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


@dataclass(frozen=True)
class Request:
    """What a child is to run, and the files for its answer, its output and its errors."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    budget_s: float
    reply: int
    stdout: int
    stderr: int
    env: Mapping[str, str]

    @property
    def call(self) -> str:
        """The part that the child reads, as JSON."""
        names = ("target", "args", "kwargs", "budget_s")
        return json.dumps({name: getattr(self, name) for name in names})


class Child(Protocol):
    """A child that was started: the leader of a new session and process group."""

    pid: int

    def reap(self) -> int:
        """Wait for its end; return its exit status, or the negative number of its signal."""
        ...


class FreshChild:
    """A new Python process."""

    def __init__(self, request: Request) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-W", "error", "-m", __name__, str(request.reply)],
            stdin=subprocess.PIPE,
            stdout=request.stdout,
            stderr=request.stderr,
            env=request.env,
            pass_fds=(request.reply,),
            start_new_session=True,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.call)
            self._process.stdin.close()
        except BrokenPipeError:
            pass

    def reap(self) -> int:
        """Wait for its end; return its exit status, or the negative number of its signal."""
        return self._process.wait()


class ChildFailure(AssertionError):
    """The child did not end as expected; `result` says how it ended."""

    def __init__(self, expect: Expect, result: ChildResult) -> None:
        super().__init__(f"expected {expect!r}, but {result.describe()}")
        self.result = result


def dotted(function: Callable[..., Any]) -> str:
    """Return the `module:name` with which a child finds a module-level function."""
    if "." in function.__qualname__ or "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not a module-level function")
    return f"{function.__module__}:{function.__name__}"


def run_child(
    target: Callable[..., Any] | str,
    /,
    *args: Any,
    budget_s: float = 10.0,
    expect: Expect = 0,
    env: Mapping[str, str] | None = None,
    paths: Sequence[str] = (),
    start: Callable[[Request], Child] = FreshChild,
    **kwargs: Any,
) -> ChildResult:
    """Run a function or source text in a fresh Python process with a time limit.

    Args:
        target: a module-level function, its name as `package.module:function`, or source text.
        *args: positional arguments of the function; sent as JSON, so tuples arrive as lists.
        budget_s: seconds that the code may take; scaled by PYUFFD_BUDGET_SCALE.
        expect: the expected return code (negative for a signal), "timeout", or None for any.
        env: environment variables to add.
        paths: folders to import from first.
        start: the function that starts the process.
        **kwargs: keyword arguments of the function, through JSON.

    Returns:
        How the child ended.

    Raises:
        Lack: the child raised it, or pytest skipped there.
        ChildFailure: the child ended differently from `expect`.
    """
    if callable(target):
        target = dotted(target)
    budget = budget_s * SCALE
    started = time.monotonic()
    reply = os.memfd_create("child-reply", 0)
    # Files, not pipes: a grandchild that keeps them open must not make the parent wait.
    out, err = os.memfd_create("child-stdout"), os.memfd_create("child-stderr")
    try:
        path = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, **(env or {})}
        child = start(Request(target, args, kwargs, budget, reply, out, err, environment))
        killed = not wait_for_end(child.pid, STARTUP_S * SCALE + budget + MARGIN_S)
        # Kill the other members of its group too. It is not reaped yet, so the id is still its own.
        os.killpg(child.pid, signal.SIGKILL)
        returncode = child.reap()
        stderr = _contents(err)
        answer = json.loads(_contents(reply) or "{}")
        result = ChildResult(
            returncode=returncode,
            stdout=_contents(out),
            stderr=stderr,
            timed_out=killed or re.search(r"^Timeout \(\d+:", stderr, re.MULTILINE) is not None,
            elapsed_s=time.monotonic() - started,
            value=answer.get("value"),
        )
    finally:
        for fd in (reply, out, err):
            os.close(fd)
    if "skipped" in answer:
        raise Lack(*answer["skipped"])
    if expect is not None and expect != ("timeout" if result.timed_out else result.returncode):
        raise ChildFailure(expect, result)
    return result


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended, without reaping it; return whether it has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def _contents(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, encoding="utf-8", errors="replace", closefd=False) as file:
        return file.read()


def perform(call: str, reply: int) -> None:
    """Carry out the order in the child, and write the answer."""
    os.set_inheritable(reply, False)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    request = json.loads(call)
    # Of the thread that dies: those of others crash the dump if they run meanwhile.
    faulthandler.enable(all_threads=False)
    faulthandler.dump_traceback_later(request["budget_s"] + STARTUP_S * SCALE, exit=True)
    target = request["target"]
    answer: dict[str, Any] = {}
    make_do(strictly=strict())
    try:
        if DOTTED.fullmatch(target):
            module, name = target.split(":")
            function = getattr(importlib.import_module(module), name)
            faulthandler.dump_traceback_later(request["budget_s"], exit=True)
            answer["value"] = function(*request["args"], **request["kwargs"])
        else:
            code = compile(target, "<child source>", "exec")
            faulthandler.dump_traceback_later(request["budget_s"], exit=True)
            exec(code, {"__name__": "__main__"})
    except Lack as error:
        answer["skipped"] = [error.keys, error.reason]
    except BaseException as error:
        if type(error).__name__ != "Skipped":  # by name: pytest may not be installed
            raise
        lack = lack_of(error)
        answer["skipped"] = [lack.keys if lack else [], str(error)]
    os.write(reply, json.dumps(answer).encode())


if __name__ == "__main__":
    perform(sys.stdin.read(), int(sys.argv[1]))
