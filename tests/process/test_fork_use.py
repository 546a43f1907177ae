"""A userfaultfd in a forked child is refused, and still works in the parent."""

from __future__ import annotations

import gc
import os
import traceback
import warnings
from collections.abc import Callable

import pytest

from pyuffd import ClosedError, Feature, PageExistsError, Region, Userfaultfd
from pyuffd.testing import needs
from tests._child import run_child
from tests.kernel._faults import Task, fork, next_fault
from tests.kernel.test_userfaultfd_open import CALLS

pytestmark = needs(Feature(0))

PAGE = 4096


def in_a_fork(function: Callable[[], object]) -> int:
    """Run a function in a fork of this process; return 0 if it raised nothing."""
    pid = fork()
    if not pid:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def still_serves(uffd: Userfaultfd, region: Region) -> None:
    task = Task(region.read, 0, 1)
    assert uffd.copy(next_fault(uffd).address, b"\x05" * PAGE) == PAGE
    assert task.result() == b"\x05"


def every_call_is_refused() -> None:
    with Region.anonymous(2 * PAGE) as region, Userfaultfd() as uffd:
        uffd.register(region)

        def child() -> None:
            for name, call in CALLS.items():
                with pytest.raises(ClosedError) as caught:
                    call(uffd, region.start)
                assert str(os.getppid()) in str(caught.value), name

        assert in_a_fork(child) == 0
        still_serves(uffd, region)


def closing_in_the_child() -> None:
    with Region.anonymous(2 * PAGE) as region, Userfaultfd() as uffd:
        uffd.register(region)
        told: list[bool] = []
        fd = uffd.fileno()
        uffd._on_close(lambda: told.append(True))

        def child() -> None:
            uffd.close()
            uffd.close()
            assert uffd.closed
            assert not told, "the parent's handlers are not the child's to stop"
            try:
                os.fstat(fd)
            except OSError:
                return
            raise AssertionError("the child's descriptor is still open")

        assert in_a_fork(child) == 0
        assert not told
        still_serves(uffd, region)


def forgetting_in_the_child() -> None:
    with Region.anonymous(2 * PAGE) as region:
        held = [Userfaultfd()]
        held[0].register(region)

        def child() -> None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                held.clear()
                gc.collect()
            assert not caught, [str(each.message) for each in caught]

        assert in_a_fork(child) == 0
        still_serves(held[0], region)
        held[0].close()


def one_of_its_own() -> None:
    with Region.anonymous(2 * PAGE) as region, Userfaultfd() as uffd:
        uffd.register(region)

        def child() -> None:
            with Userfaultfd() as own:
                own.register(region)
                still_serves(own, region)

        assert in_a_fork(child) == 0
        still_serves(uffd, region)
        with pytest.raises(PageExistsError):
            uffd.copy(region.start, bytes(PAGE))


def test_every_call_is_refused_in_a_fork() -> None:
    run_child(every_call_is_refused)


def test_closing_in_a_fork() -> None:
    run_child(closing_in_the_child)


def test_forgetting_in_a_fork() -> None:
    run_child(forgetting_in_the_child)


def test_a_fork_opens_its_own() -> None:
    run_child(one_of_its_own)
