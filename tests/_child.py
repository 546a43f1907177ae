"""Run code that may stall in a child process, as `pyuffd.testing` does, but from a zygote.

Functions, also those given by name, run in a fork of a zygote (tests/_zygote.py). Source text runs
in a new process, and so does code that needs another environment from the start.
PYUFFD_FRESH_CHILDREN=1 runs everything in new processes.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyuffd.testing import _run
from pyuffd.testing._need import Lack
from pyuffd.testing._run import DOTTED, Child, ChildResult, Expect, FreshChild, Request
from pyuffd.testing._skips import skip
from tests._zygote import Zygote

ROOT = Path(__file__).resolve().parent.parent
FRESH = os.environ.get("PYUFFD_FRESH_CHILDREN") == "1"

_one_at_a_time = threading.Lock()
_zygotes: list[Zygote] = []


def zygote() -> Zygote:
    """Return the zygote of this process, started on first use."""
    if not _zygotes:
        started = Zygote()
        atexit.register(started.__exit__)
        _zygotes.append(started)
    return _zygotes[0]


def crowd() -> float:
    """Return how many threads compete for each CPU, at least 1; limits for hangs scale with it."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def limit_s(seconds: float) -> float:
    """Return a limit for a program that may hang: PYUFFD_BUDGET_SCALE and the load stretch it."""
    return seconds * _run.SCALE * crowd()


def run_child(
    target: Callable[..., Any] | str,
    /,
    *args: Any,
    budget_s: float = 10.0,
    expect: Expect = 0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> ChildResult:
    """Run a function or source text in a child process with a time limit.

    Args:
        target: a module-level function, its name as `package.module:function`, or source text.
        *args: positional arguments of the function; sent as JSON, so tuples arrive as lists.
        budget_s: seconds that the code may take; scaled by PYUFFD_BUDGET_SCALE and by the load of
            the machine.
        expect: the expected return code (negative for a signal), "timeout", or None for any.
        env: environment variables to add.
        **kwargs: keyword arguments of the function, through JSON.

    Returns:
        How the child ended. A skip raised in the child is raised again here.

    Raises:
        ChildFailure: the child ended differently from `expect`.
    """
    start: Callable[[Request], Child] = FreshChild
    is_function = callable(target) or DOTTED.fullmatch(target) is not None
    forked = is_function and not env and not FRESH and _one_at_a_time.acquire(blocking=False)
    if expect != "timeout":
        budget_s *= crowd()
    try:
        if forked:
            start = zygote().fork
        return _run.run_child(
            target,
            *args,
            budget_s=budget_s,
            expect=expect,
            env=env,
            paths=[str(ROOT)],
            start=start,
            **kwargs,
        )
    except Lack as lack:
        skip(lack)
    finally:
        if forked:
            _one_at_a_time.release()
