"""Handler: the order in which objects end, forks, interpreter exit, and the state after errors."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import tempfile
import threading
from collections.abc import Callable

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    _left,
)
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import (
    Driver,
    both_drivers,
    content,
    everywhere,
    handler_of,
    in_fork,
    is_lost,
    open_fds,
    run_threads,
    serving,
    thread_names,
    wait_for_stalled,
    wait_until,
    with_both_drivers,
)


def unserve(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        first, second = memory.pages(2), memory.pages(2)
        size, data = memory.page_size, content(first.length)
        for region in (first, second):
            handler.serve(region, BufferSource(data))
        handler.start()
        assert first.read(0, size) == data[:size]
        handler.unserve(first)
        assert not is_lost(first)
        assert is_lost(first, size)
        for call in (handler.unserve, handler.populate, handler.page_states):
            with pytest.raises(ValueError):
                call(first)
        assert second.read() == data
        handler.populate(second)
        handler.unserve(second.start)  # by address
        assert second.read() == data
        # It may be served again: with its own content, or from a source after it was dropped.
        second.punch_hole()
        handler.serve(second, BufferSource(data[::-1]))
        assert second.read() == data[::-1]


test_unserve = everywhere(unserve, "anon", "shmem", "hugetlb")


def region_closes(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        first, second = memory.pages(2), memory.pages(2)
        data = content(first.length)
        for region in (first, second):
            handler.serve(region, BufferSource(data))
        handler.start()
        first.touch(0, 1)
        start = first.start
        first.close()
        assert "1 range" in repr(handler)
        with pytest.raises(ValueError):
            handler.unserve(start)
        assert second.read() == data
        again = memory.pages(2)
        handler.serve(again, BufferSource(data))
        assert again.read() == data


test_region_closed_while_served = everywhere(region_closes, "anon", "shmem", "hugetlb")


def userfaultfd_closes(driver: Driver) -> None:
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    handler = Handler(uffd, driver=driver)
    with Region.anonymous(2 * PAGE) as region:
        handler.serve(region, BufferSource(content(2 * PAGE)))
        handler.start()
        assert region.read(0, PAGE) == content(2 * PAGE)[:PAGE]
        uffd.close()
        assert uffd.closed
        assert "stopped" in repr(handler)
        assert handler.stats().faults["missing"] == 1
        assert len(handler.recent_faults()) == 1
        assert is_lost(region, PAGE)
        assert not is_lost(region)
        handler.stop()
        for call in (
            handler.start,
            lambda: handler.serve(region, ZeroSource()),
            lambda: handler.populate(region),
            lambda: handler.page_states(region),
            lambda: handler.unserve(region),
            lambda: handler.writeprotect(region),
        ):
            with pytest.raises(ClosedError):
                call()


test_userfaultfd_closed_while_served = with_both_drivers(userfaultfd_closes)


def failure_closes() -> None:
    """Userfaultfd.close() raises the handler's failure, and closes anyway."""
    uffd = Userfaultfd()
    handler = Handler(uffd)
    with Region.anonymous(PAGE) as region, tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(PAGE))
        with FileSource(file) as source:
            handler.serve(region, source)
        handler.start()
        file.truncate(0)
        assert is_lost(region)
        with pytest.raises(HandlerError):
            uffd.close()
        assert uffd.closed
        uffd.close()


@needs_kernel_faults()
def test_userfaultfd_closes_after_a_failure() -> None:
    run_child(failure_closes)


def exception_kept(driver: Driver, fails: bool) -> None:
    """The body's exception stays, and the handler's failure is a note on it."""
    with (
        Region.anonymous(2 * PAGE) as region,
        tempfile.TemporaryFile(buffering=0) as file,
        pytest.raises(KeyError) as caught,
        handler_of(driver) as handler,
    ):
        file.write(bytes(2 * PAGE))
        with FileSource(file) as source:
            handler.serve(region, source)
        handler.start()
        if fails:
            file.truncate(0)
            assert is_lost(region)
        raise KeyError("the body's own")
    assert caught.value.args == ("the body's own",)
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == fails
    assert "stopped" in repr(handler)


@needs_kernel_faults()
@pytest.mark.parametrize(
    ("driver", "fails"), [("native", False), ("native", True), ("inline", False)]
)
def test_exception_in_the_body(driver: Driver, fails: bool) -> None:
    run_child(exception_kept, driver, fails)


def forked(driver: Driver) -> None:
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        region.touch(0, 1)

        def child() -> None:
            calls: list[Callable[[], object]] = [
                handler.start,
                handler.stats,
                handler.recent_faults,
                lambda: handler.serve(region, ZeroSource()),
                lambda: handler.unserve(region),
                lambda: handler.populate(region),
                lambda: handler.page_states(region),
                lambda: handler.writeprotect(region),
                lambda: handler.preserve(region),
            ]
            for call in calls:
                with pytest.raises(ClosedError):
                    call()
            handler.stop()
            handler.close()
            region.close()
            handler.uffd.close()

        assert in_fork(child) == 0
        # The parent's handler was not affected.
        assert region.read() == data
        assert handler.stats().faults["missing"] == 2


test_forked_child = with_both_drivers(forked)


def fork_exits(driver: Driver) -> None:
    """A fork that runs the exit handlers does not touch its parent's handler."""
    with serving(driver, "shmem") as (handler, memory):
        region = memory.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert in_fork(atexit._run_exitfuncs) == 0
        assert region.read() == data


test_fork_runs_exit_handlers = with_both_drivers(fork_exits)


LEFT_RUNNING = """
import threading
from pyuffd import *
uffd = Userfaultfd(features=Feature.SIGBUS if {driver!r} == "inline" else Feature(0))
region = Region.anonymous(8192)
handler = Handler(uffd, driver={driver!r})
handler.serve(region, BufferSource(b"a" * 8192))
handler.start()
assert region.read(0, 1) == b"a"
{more}
print("end")
"""


@both_drivers
def test_left_running_at_exit(driver: Driver) -> None:
    ended = run_child(LEFT_RUNNING.format(driver=driver, more=""))
    assert ended.stdout == "end\n"
    assert 'Traceback (most recent call last):\n  File "<child' not in ended.stderr


@both_drivers
def test_left_running_at_exit_by_exception(driver: Driver) -> None:
    ended = run_child(LEFT_RUNNING.format(driver=driver, more="raise KeyError('x')"), expect=1)
    assert "KeyError: 'x'" in ended.stderr


def waits_at_exit() -> None:
    """A thread that waits when the exit handlers run gets no zeros."""
    region = Region.anonymous(PAGE)
    uffd = Userfaultfd()
    handler = Handler(uffd)
    handler.serve(region, BufferSource(b"a" * PAGE))
    out = os.memfd_create("out")

    def write() -> None:
        ctypes.CDLL(None).write(out, ctypes.c_void_p(region.start), 1)

    thread = threading.Thread(target=write)
    thread.start()
    wait_for_stalled(uffd, 1)
    handler.start()
    atexit._run_exitfuncs()
    thread.join()
    assert os.pread(out, 1, 0) == b"a"
    assert "stopped" in repr(handler)
    uffd.close()
    region.close()
    os.close(out)


@needs_kernel_faults()
def test_thread_waiting_at_exit() -> None:
    run_child(waits_at_exit)


def twice(driver: Driver) -> None:
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(1)
        handler.serve(region, ZeroSource())
        handler.start()
        handler.start()
        region.touch()
        handler.stop()
        handler.stop()
        handler.close()
        final = handler.stats()
        assert final.faults["missing"] == 1
        assert handler.stats() == final
        with pytest.raises(ClosedError):
            handler.start()


test_start_and_stop_twice = with_both_drivers(twice)


def stop_by_many_threads(driver: Driver) -> None:
    with serving(driver, "anon") as (handler, memory):
        regions = [memory.pages(1) for _ in range(50)]
        for region in regions:
            handler.serve(region, ZeroSource())
        handler.start()

        def close_regions() -> None:
            for region in regions:
                region.close()

        run_threads(
            handler.stop,
            handler.stop,
            close_regions,
            handler.uffd.close,
        )
        assert "stopped" in repr(handler)


test_stop_from_several_threads = with_both_drivers(stop_by_many_threads)


def dropped_without_stop(driver: Driver) -> None:
    """Closing the userfaultfd is enough: a handler that was not stopped leaves nothing behind."""
    fds = open_fds()
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    for _ in range(3):
        with Region.memfd(2 * PAGE) as region, Userfaultfd(features=features) as uffd:
            handler = Handler(uffd, driver=driver)
            region.fill(1)
            handler.serve(
                region, BufferSource(bytes(2 * PAGE)), mode=RegisterMode.MINOR, present="keep"
            )
            handler.start()
            region.touch()
            del handler
    gc.collect()
    assert open_fds() == fds
    # Do not compare the whole list: it can lack a living thread while another one exits.
    wait_until(
        lambda: not any(name.startswith("uffd-") for name in thread_names()), "the threads are gone"
    )


test_handler_dropped_without_stop = with_both_drivers(dropped_without_stop)


def many_handlers(driver: Driver) -> None:
    """Handlers on userfaultfds of their own run at the same time, and end in any order."""
    fds = open_fds()
    regions = [Region.anonymous(2 * PAGE) for _ in range(6)]
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    uffds = [Userfaultfd(features=features) for _ in regions]
    handlers = [Handler(uffd, driver=driver) for uffd in uffds]
    for index, (handler, region) in enumerate(zip(handlers, regions, strict=True)):
        handler.serve(region, BufferSource(bytes([index + 1]) * region.length))
        handler.start()
    for region in regions:
        region.touch(0, 1)
    for index in (3, 0, 5, 1, 4, 2):
        assert regions[index].read(PAGE, 1) == bytes([index + 1])
        assert handlers[index].stats().faults["missing"] == 2 or driver == "native"
        handlers[index].stop()
        assert handlers[index].stats().faults["missing"] == 2
        uffds[index].close()
        regions[index].close()
    assert open_fds() == fds


test_handlers_side_by_side = with_both_drivers(many_handlers)


class Interrupted(BaseException):
    """What a signal handler raises."""


class Interrupting(set[object]):
    """Raises, before or after it has added one."""

    def __init__(self, *, late: bool) -> None:
        self.late = late

    def add(self, one: object, /) -> None:
        if self.late:
            super().add(one)
        raise Interrupted


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_interrupted_as_it_holds_the_descriptor_open(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    with Userfaultfd() as uffd:
        monkeypatch.setattr(_left, "_in_use", Interrupting(late=late))
        with pytest.raises(Interrupted):
            Handler(uffd)
    monkeypatch.undo()
    assert open_fds() == before


def test_no_access_begins_while_a_region_closes() -> None:
    """What begins between the end of serving and munmap would find zeros."""
    met: list[object] = []

    def touch() -> None:
        for access in (lambda: region.read(0, 4), region.memoryview, part.digest):
            try:
                met.append(access())
            except ClosedError as error:
                met.append(type(error))

    with Userfaultfd() as uffd, Handler(uffd) as handler:
        region = Region.anonymous(2 * PAGE)
        part = region[PAGE:]
        region._on_close(lambda: run_threads(touch))  # after the handler's
        handler.serve(region, b"c" * 2 * PAGE)
        region.close()
    assert met == [ClosedError] * 3
