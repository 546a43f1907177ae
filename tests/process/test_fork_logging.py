"""The library's log lines, in a fork of a process whose threads log, and after an interrupted fork.

Files that a child inherits are another matter: CPython resets the locks of the standard streams
and of logging in the child, and not those of the buffers of other files (see
docs/help/troubleshooting.md, other hangs).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from types import FrameType
from typing import Any

import pytest

from pyuffd._describe import log_error
from pyuffd.handlers._failures import tell
from pyuffd.testing._run import SCALE
from tests._child import run_child

FORKS = 12
LIMIT_S = 5  # of a child
WAIT_S = 1.5  # for a thread that may wait forever
LOG = logging.getLogger("pyuffd.handlers._link")


def in_forks() -> list[int]:
    """Log in forks while other threads are inside logging; return how the children ended."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logging.getLogger().addHandler(logging.StreamHandler())

    def log() -> None:
        while True:
            LOG.warning("pyuffd: %s", "x" * 1000)

    for _ in range(3):
        threading.Thread(target=log, daemon=True).start()
    ended = set()
    for _ in range(FORKS):
        pid = os.fork()
        if not pid:
            signal.alarm(LIMIT_S)
            LOG.warning("pyuffd: in the child")
            log_error(LOG, "pyuffd: an error", ValueError("x"))
            tell(LOG, 2, "another", ValueError("y"))
            os._exit(0)
        ended.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return sorted(ended)


def test_a_child_logs() -> None:
    assert run_child(in_forks, budget_s=60).value == [0]


def after_an_interrupted_fork(is_known: bool) -> bool:
    """Raise as os.fork() gives back the lock of logging; return whether other threads log."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logging.getLogger().addHandler(logging.StreamHandler())
    if is_known:
        LOG.isEnabledFor(logging.WARNING)

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        caller = frame.f_back
        if frame.f_code.co_name == "_releaseLock" and caller and caller.f_code.co_name == here:
            sys.settrace(None)
            raise KeyboardInterrupt

    here = "after_an_interrupted_fork"
    sys.settrace(trace)
    pid = os.fork()
    sys.settrace(None)
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    thread = threading.Thread(target=lambda: LOG.warning("pyuffd: in a thread"), daemon=True)
    thread.start()
    thread.join(WAIT_S * SCALE)
    return not thread.is_alive()


@pytest.mark.parametrize("is_known", [False, True], ids=["first", "later"])
def test_after_an_interrupted_fork(is_known: bool) -> None:
    """Before Python 3.13 logging keeps its lock; a logger that has logged before needs none."""
    logs = run_child(after_an_interrupted_fork, is_known, budget_s=30).value
    assert logs is (is_known or sys.version_info >= (3, 13))
