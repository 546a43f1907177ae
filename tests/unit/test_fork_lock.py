"""A fork while another thread holds a lock that both sides use: the child has one of its own."""

from __future__ import annotations

import os
import threading

import pytest

from pyuffd import _event_claims, _range_modes
from pyuffd._abi import RegisterMode
from pyuffd._fork_lock import ForkLock
from pyuffd._range_modes import RangeModes
from pyuffd.dirty import _tracker
from tests._child import run_child


def in_a_fork() -> int:
    """Return the status of a child that notes a range while a thread of ours did so."""
    entered, over = threading.Event(), threading.Event()

    def change() -> None:
        with _range_modes._lock.now, _event_claims._claiming.now, _tracker._claiming.now:
            entered.set()
            over.wait()

    modes = RangeModes()
    thread = threading.Thread(target=change)
    thread.start()
    entered.wait()
    child = os.fork()
    if not child:
        modes.set(0x1000, 0x2000, RegisterMode.WP)
        with _event_claims._claiming.now, _tracker._claiming.now:
            os._exit(len(modes.overlapping(0, 0x3000)))
    status = os.waitpid(child, 0)[1]
    over.set()
    thread.join()
    return os.waitstatus_to_exitcode(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_another_thread_has_it() -> None:
    assert run_child(in_a_fork).value == 1


def test_the_thread_that_forks_has_it() -> None:
    lock = ForkLock()
    with lock.now:
        lock._start_anew()
    assert lock.now.acquire(blocking=False)
