"""Methods of a Region raise PagePoisonedError where a direct access would be SIGBUS."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    HandlerError,
    Pagemap,
    PagePoisonedError,
    Region,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs, needs_hugepages, needs_privilege
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._serving import content, in_fork
from tests.kernel.test_handler_errors import unreserved_huge_pages
from tests.kernel.test_userfaultfd_open import drop_capability
from tests.process.test_failures_said import DRIVERS, IN_PYTHON, serve_failing, uffd_for

Driver = Literal["native", "inline", "thread", "process"]
PAGE = mmap.PAGESIZE
EHWPOISON = 133

pytestmark = needs(Feature.POISON)

ACCESSES: dict[str, Callable[[Region, int], object]] = {
    "read": lambda region, page: region.read(page + 5, 1),
    "read-from-before": lambda region, page: region.read(page - 8, 16),
    "write": lambda region, page: region.write(page, b"x"),
    "fill": lambda region, page: region.fill(7, page, 1),
    "touch": lambda region, page: region.touch(page, 1),
    "touch-to-write": lambda region, page: region.touch(page, 1, write=True),
    "digest": lambda region, page: region.digest(offset=page, length=16),
    "digest-of-all": lambda region, _: region.digest(),
}


@contextlib.contextmanager
def lost_pages(driver: Driver, memory: Memory) -> Iterator[tuple[Handler, Region]]:
    """A region whose first page can be read from its source, and the others cannot."""
    with (
        uffd_for(driver) as uffd,
        contextlib.suppress(HandlerError),
        Handler(uffd, driver=driver) as handler,
    ):
        region = memory.pages(3)
        serve_failing(driver, handler, region, content(region.length))
        assert region.read(0, 8) == content(region.length)[:8]
        yield handler, region


def accesses(driver: Driver, name: str) -> None:
    with contextlib.closing(memory_of(name)) as memory, lost_pages(driver, memory) as (_, region):
        size = region.page_size
        for access in ACCESSES.values():
            with pytest.raises(PagePoisonedError) as caught:
                access(region, size)
            error = caught.value
            assert error.errno == EHWPOISON
            assert (error.start, error.length) == (region.start + size, size)
            assert error.offset == size
            assert region.start + size <= error.address < region.start + 2 * size
            assert isinstance(error.__cause__, KeyError if driver in IN_PYTHON else OSError)
        assert region.read(0, size) == content(region.length)[:size]  # as before
        with pytest.raises(PagePoisonedError):
            BufferSource(region.memoryview()).read(size, 8)


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_method_raises(driver: Driver, name: str) -> None:
    run_child(accesses, driver, name)


def accesses_unseen(driver: Driver, name: str) -> None:
    """As a user without CAP_SYS_ADMIN: the page table does not tell poison from swap."""
    drop_capability("CAP_SYS_ADMIN")
    accesses(driver, name)


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_method_raises_without_privilege(driver: Driver, name: str) -> None:
    run_child(accesses_unseen, driver, name)


def after_the_stop(driver: Driver, name: str) -> None:
    with (
        contextlib.closing(memory_of(name)) as memory,
        uffd_for(driver) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        region = memory.pages(2)
        handler.serve(region, Failing())
        handler.stop()
        with pytest.raises(PagePoisonedError, match="stopped") as caught:
            region.read()
        assert caught.value.__cause__ is None


class Failing:
    length = None

    def read(self, offset: int, length: int) -> bytes:
        raise AssertionError("it is asked for nothing")


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", ["thread", "process"])
def test_pages_that_a_stop_poisoned(driver: Driver, name: str) -> None:
    run_child(after_the_stop, driver, name)


# Other causes of SIGBUS


def truncated(huge: bool, privileged: bool) -> None:
    if not privileged:
        drop_capability("CAP_SYS_ADMIN")
        drop_capability("CAP_CHECKPOINT_RESTORE")
    size = 2 << 20 if huge else PAGE
    with Region.memfd(2 * size, huge_page_size=size if huge else None) as region:
        assert region.fd is not None
        os.truncate(region.fd, size)
        for access in ACCESSES.values():
            with pytest.raises(UffdOSError, match="truncated to") as caught:
                access(region, size)
            assert not isinstance(caught.value, PagePoisonedError)
            assert caught.value.errno == errno.EFAULT
        assert region.read(0, 8) == bytes(8)


@pytest.mark.parametrize("privileged", [True, False], ids=["privileged", "unprivileged"])
@pytest.mark.parametrize("huge", [False, pytest.param(True, marks=needs_hugepages(2))])
def test_a_truncated_file(huge: bool, privileged: bool) -> None:
    run_child(truncated, huge, privileged)


def huge_pages_that_ran_out() -> None:
    """A page that is poisoned, where none is free, is told from one that cannot be allocated."""
    from pyuffd import _lost

    _lost._free_huge_pages = lambda page_size: 0
    for name in ("hugetlb", "hugetlb-private"):
        with contextlib.closing(memory_of(name)) as memory, Userfaultfd() as uffd:
            region = memory.pages(2)
            size = region.page_size
            region.write(0, b"x")
            uffd.register(region)
            uffd.poison(region.start + size, size)
            for access in ACCESSES.values():
                with pytest.raises(PagePoisonedError):
                    access(region, size)
    _lost._free_huge_pages = lambda page_size: 7
    for shared in (True, False):
        with unreserved_huge_pages(2, have=1, shared=shared) as region:
            region.write(0, b"x")
            for access in ACCESSES.values():
                with pytest.raises(UffdOSError, match="0 of its 1 pages left") as caught:
                    access(region, region.page_size)
                assert not isinstance(caught.value, PagePoisonedError)


def has_scan() -> bool:
    with Pagemap() as pagemap:
        return bool(pagemap.scan_support()[0])


@pytest.mark.skipif(not has_scan(), reason="this kernel has no PAGEMAP_SCAN (Linux 6.7)")
@needs_hugepages(4)
@needs_privilege()
def test_huge_pages_that_ran_out() -> None:
    run_child(huge_pages_that_ran_out)


def no_driver() -> None:
    """Feature.SIGBUS, without a driver that resolves in the faulting thread."""
    with Userfaultfd(features=Feature.SIGBUS) as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        with pytest.raises(UffdOSError, match="inline") as caught:
            region.read()
        assert not isinstance(caught.value, PagePoisonedError)


@needs(Feature.SIGBUS)
def test_nobody_resolves_inline() -> None:
    run_child(no_driver)


# Beside other SIGBUS handlers


def beside_faulthandler(driver: Driver, order: str) -> None:
    faulthandler.disable()
    with contextlib.closing(memory_of("anon")) as memory:
        if order == "before":
            faulthandler.enable()
        with lost_pages(driver, memory) as (_, region):
            if order == "after":
                faulthandler.enable()
                threading.Event().wait(0.01)
            for _ in range(3):
                with pytest.raises(PagePoisonedError):
                    region.read(PAGE, 1)
            if order == "between":
                faulthandler.enable()
                faulthandler.disable()
                threading.Event().wait(0.01)
                with pytest.raises(PagePoisonedError):
                    region.read(PAGE, 1)
            if order != "between":
                assert faulthandler.is_enabled()
            region.read(0, PAGE)
    if order != "between":
        assert faulthandler.is_enabled()


@pytest.mark.parametrize("order", ["before", "after", "between"])
@pytest.mark.parametrize("driver", ["native", "inline"])
def test_beside_faulthandler(driver: Driver, order: str) -> None:
    ended = run_child(beside_faulthandler, driver, order)
    assert "Fatal Python error" not in ended.stderr


def still_dies() -> None:
    """Direct access to the page is SIGBUS as before, and faulthandler reports where."""
    with (
        contextlib.closing(memory_of("anon")) as memory,
        lost_pages("native", memory) as (_, region),
    ):
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)
        with region.memoryview() as view:
            view[PAGE]


def test_direct_access_is_still_fatal() -> None:
    ended = run_child(still_dies, expect=-signal.SIGBUS)
    assert "Bus error" in ended.stderr


def python_handler() -> None:
    """A Python handler of SIGBUS is kept for signals that are sent."""
    seen: list[int] = []
    signal.signal(signal.SIGBUS, lambda number, _: seen.append(number))
    with (
        contextlib.closing(memory_of("anon")) as memory,
        lost_pages("native", memory) as (_, region),
    ):
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)
        signal.raise_signal(signal.SIGBUS)
        assert seen == [signal.SIGBUS]


def test_beside_a_python_handler() -> None:
    run_child(python_handler)


# Threads, masks, forks


def in_threads(driver: Driver) -> None:
    with (
        contextlib.closing(memory_of("anon")) as memory,
        lost_pages(driver, memory) as (_, region),
    ):
        wrong: list[object] = []

        def work(number: int) -> None:
            for turn in range(40):
                try:
                    if (turn + number) % 2:
                        region.read(0, 64)
                    else:
                        region.touch(PAGE, 1)
                        wrong.append("no error")
                except PagePoisonedError as error:
                    if error.offset != PAGE:
                        wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.parametrize("driver", ["native", "inline"])
def test_many_threads(driver: Driver) -> None:
    run_child(in_threads, driver, budget_s=20)


def blocked(driver: Driver) -> None:
    """If SIGBUS is blocked the kernel kills at once; afterwards the mask is unchanged."""
    with (
        contextlib.closing(memory_of("anon")) as memory,
        lost_pages(driver, memory) as (_, region),
    ):

        def work() -> None:
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
            for access in ACCESSES.values():
                with pytest.raises(PagePoisonedError):
                    access(region, PAGE)
                assert signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, [])
            did.append(region.read(0, 8))

        masks: list[object] = []
        did: list[bytes] = []
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert did == [content(region.length)[:8]]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("driver", DRIVERS)
def test_sigbus_blocked(driver: Driver) -> None:
    run_child(blocked, driver)


def forked() -> None:
    with (
        contextlib.closing(memory_of("anon")) as memory,
        lost_pages("native", memory) as (_, region),
    ):
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)

        def child() -> None:
            with pytest.raises(PagePoisonedError):
                region.read(PAGE, 1)

        assert in_fork(child) == 0


def test_in_a_fork() -> None:
    run_child(forked)
