"""Functions and structures of the shim that two threads use first, at once."""

from __future__ import annotations

import gc
import os
import threading

from pyuffd._shim import ffi, lib
from tests._child import run_child

COLLECTIONS = 40


def use_all() -> None:
    for name in dir(lib):
        getattr(lib, name)
    for name in ffi.list_types()[1]:
        ffi.typeof(f"struct {name}")


def interrupted(number: int) -> None:
    """Let the garbage collector's run of this number wait for another thread that uses all, too."""
    other = threading.Thread(target=use_all)
    runs = 0

    def collects(phase: str, _info: dict[str, int]) -> None:
        nonlocal runs
        runs += phase == "start"
        if phase == "start" and runs == number:
            other.start()
            other.join()

    gc.callbacks.append(collects)
    gc.set_threshold(1)
    use_all()


def interrupted_everywhere() -> list[int]:
    """Return with which number a process was ended by a signal; each has used nothing before."""
    ended = []
    for number in range(1, COLLECTIONS):
        pid = os.fork()
        if pid == 0:
            try:
                interrupted(number)
            finally:
                os._exit(0)
        if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            ended.append(number)
    return ended


def test_by_two_threads() -> None:
    assert run_child(interrupted_everywhere, budget_s=30).value == []
