"""A handler refuses to serve memory that it reads or writes itself, in either order."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pyuffd import BufferSource, Handler, HandoverRange, Region, RegisterMode, ZeroSource
from pyuffd.handlers import _overlaps
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import Driver, handler_of, in_fork, with_both_drivers

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
Use = Literal["source", "preserve", "local read", "local written"]


@dataclass(frozen=True)
class Row:
    """A use of memory, how it is served, and whether the engine would wait for itself."""

    use: Use
    mode: RegisterMode
    refused: bool


TABLE = [
    Row("source", MISSING, True),
    Row("source", MISSING | WP, True),
    Row("source", MINOR, True),
    Row("source", WP, False),  # a protected page can be read
    Row("preserve", MISSING, True),
    Row("preserve", WP, True),
    Row("local read", MISSING, True),
    Row("local read", WP, False),
    Row("local written", MISSING, True),
    Row("local written", WP, True),
    Row("local written", MINOR, True),
]
ids = [f"{row.use}-{row.mode.name}" for row in TABLE]


def using(handler: Handler, memory: Region, use: Use) -> Callable[[], object]:
    """Return a call that serves another region by means of this memory."""
    if use == "source":
        other = Region.anonymous(memory.length)
        return lambda: handler.serve(other, BufferSource(memory.memoryview()))
    if use == "preserve":
        other = Region.anonymous(memory.length)
        kept = memory.memoryview()
        return lambda: handler.serve(other, None, mode=WP, preserve=kept)
    other = memory.alias()
    if use == "local read":
        kept = bytearray(memory.length)  # type: ignore[assignment]
        return lambda: handler.serve(other, None, mode=WP, preserve=kept, local=memory)
    source = BufferSource(bytes(memory.length))
    return lambda: handler.serve(other, source, mode=MINOR, local=memory)


def serving(handler: Handler, memory: Region, mode: RegisterMode) -> Callable[[], object]:
    source = ZeroSource() if mode & MISSING else None
    present: Literal["keep"] | None = "keep" if source is not None else None
    return lambda: handler.serve(memory, source, mode=mode, present=present)


@contextlib.contextmanager
def refused(memory: Region, expected: bool) -> Iterator[None]:
    """Check that a call is refused with an error that names the memory."""
    if not expected:
        yield
        return
    with pytest.raises(ValueError, match=f"{memory.start:#x}"):
        yield


def check_both_orders(number: int) -> None:
    row = TABLE[number]
    for served_first in (True, False):
        memory = Region.memfd(4 * PAGE)
        memory.fill(1)
        with handler_of("native") as handler:
            calls = [serving(handler, memory, row.mode), using(handler, memory, row.use)]
            first, second = calls if served_first else reversed(calls)
            first()
            before = repr(handler)
            with refused(memory, row.refused):
                second()
            if row.refused:
                assert repr(handler) == before
            handler.start()


@pytest.mark.parametrize("number", range(len(TABLE)), ids=ids)
def test_both_orders(number: int) -> None:
    run_child(check_both_orders, number)


def check_message_names_both(driver: Driver) -> None:
    first, second = Region.anonymous(PAGE), Region.anonymous(PAGE)
    source = BufferSource(second.memoryview())
    with handler_of(driver) as handler:
        handler.serve(first, source)
        with pytest.raises(ValueError) as caught:
            handler.serve(second, ZeroSource())
        for part in (repr(source), f"{first.start:#x}", f"{second.start:#x}"):
            assert part in str(caught.value)
        handler.unserve(first)  # now it may be
        handler.serve(second, BufferSource(b"b" * PAGE))
        handler.start()
        assert second.read(0, 1) == b"b"


test_message_names_both = with_both_drivers(check_message_names_both)


def check_one_byte() -> None:
    first, second = Region.anonymous(PAGE), Region.anonymous(2 * PAGE)
    source = BufferSource(second.memoryview()[1 : PAGE + 1])
    with handler_of("native") as handler:
        handler.serve(first, source)
        for page in (0, 1):
            with pytest.raises(ValueError):
                handler.serve(HandoverRange(second.start + page * PAGE, PAGE, PAGE), ZeroSource())


def test_one_byte_is_enough() -> None:
    run_child(check_one_byte)


def check_memory_of_two_handlers() -> None:
    with (
        Region.anonymous(PAGE) as last,
        handler_of("native") as one,
        handler_of("native") as other,
    ):
        first = Region.anonymous(PAGE)
        one.serve(first, BufferSource(b"1" * PAGE))
        other.serve(last, BufferSource(first.memoryview()))
        one.start()
        other.start()
        assert last.read(0, 1) == b"1"


@needs_kernel_faults()
def test_memory_of_two_handlers() -> None:
    """Memory of another handler can be a source: the other handler resolves its faults."""
    run_child(check_memory_of_two_handlers)


def check_circle(count: int) -> None:
    """Each handler's memory has content from the next one's; the last would close the circle."""
    with contextlib.ExitStack() as stack:
        memory = [stack.enter_context(Region.anonymous(2 * PAGE)) for _ in range(count)]
        handlers = [stack.enter_context(handler_of("native")) for _ in range(count)]
        for at in range(count - 1):
            handlers[at].serve(memory[at][:PAGE], BufferSource(memory[at + 1][:PAGE]))
        with pytest.raises(ValueError, match="each other, as each has content in memory"):
            handlers[-1].serve(memory[-1][:PAGE], BufferSource(memory[0][:PAGE]))
        # What no handler serves may be a source, and so may the first one's after it has changed.
        handlers[-1].serve(memory[-1][:PAGE], BufferSource(b"a" * PAGE))
        handlers[0].unserve(memory[0][:PAGE])
        handlers[0].serve(memory[0][:PAGE], BufferSource(b"b" * PAGE), present="drop")
        handlers[-1].serve(memory[-1][PAGE:], BufferSource(memory[0][:PAGE]))
        # Now the circle would be closed in the middle.
        with pytest.raises(ValueError, match="each other, as each has content in memory"):
            handlers[0].serve(memory[0][PAGE:], BufferSource(memory[-1][PAGE:]))
        for handler in handlers:
            handler.start()
        assert memory[-1].read(0, 1) == b"a"
        assert memory[-1].read(PAGE, 1) == b"b"


@needs_kernel_faults()
@pytest.mark.parametrize("count", [2, 3])
def test_circle(count: int) -> None:
    """Threads of several handlers would wait for each other's pages, without an end."""
    run_child(check_circle, count)


def served_before_it_is_used(last: Region, first: Region, handlers: list[Handler]) -> None:
    handlers[0].serve(first[:PAGE], BufferSource(last[:PAGE]))
    handlers[1].serve(last[PAGE:], BufferSource(first[PAGE:]))
    handlers[0].serve(first[PAGE:], ZeroSource())
    with pytest.raises(ValueError, match="each other"):
        handlers[1].serve(last[:PAGE], ZeroSource())


def check_closed_by_serving() -> None:
    with (
        Region.anonymous(2 * PAGE) as first,
        Region.anonymous(2 * PAGE) as last,
        handler_of("native") as one,
        handler_of("native") as other,
    ):
        served_before_it_is_used(last, first, [one, other])


def test_closed_by_serving_what_another_uses() -> None:
    run_child(check_closed_by_serving)


def check_fork_while_another_thread_serves() -> None:
    def serve() -> None:
        with handler_of("native") as handler, Region.anonymous(PAGE) as region:
            handler.serve(region, BufferSource(b"x" * PAGE))
            handler.start()
            assert region.read(0, 1) == b"x"

    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with _overlaps.overlaps_lock():
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert in_fork(serve) == 0
    over.set()
    thread.join()
    serve()


def test_fork_while_another_thread_serves() -> None:
    run_child(check_fork_while_another_thread_serves)


def seconds_for(count: int) -> float:
    """CPU time of serving this many ranges."""
    source = BufferSource(b"a" * PAGE)
    with Region.anonymous(2 * count * PAGE) as region, handler_of("native") as handler:
        began = time.thread_time()
        for index in range(count):
            handler.serve(HandoverRange(region.start + 2 * index * PAGE, PAGE, PAGE), source)
        return time.thread_time() - began


def check_many_ranges() -> None:
    # With t = a n + c n^2, a growth of c / a > 1 / 3000 is seen.
    few, many = 500, 4_000
    for _ in range(5):  # others may use the machine during one
        times = seconds_for(many) / seconds_for(few)
        if times < 2 * many / few:
            return
    raise AssertionError(f"{times:.0f} times as long for {many // few} times as many")


def test_many_ranges() -> None:
    """The time for one more range does not grow with the number of served ranges."""
    run_child(check_many_ranges, budget_s=60)


def lines_for(count: int) -> list[int]:
    """Lines of Python that serving so many ranges, and taking them out again, executes."""
    executed = [0]

    def trace(_frame: object, event: str, _arg: object) -> Any:
        executed[0] += event == "line"
        return trace

    source, found = BufferSource(b"a" * PAGE), []
    with Region.anonymous(2 * count * PAGE) as region, handler_of("native") as handler:
        ranges = [HandoverRange(region.start + 2 * n * PAGE, PAGE, PAGE) for n in range(count)]
        for call in (lambda one: handler.serve(one, source), handler.unserve):
            executed[0] = 0
            sys.settrace(trace)
            try:
                for one in ranges:
                    call(one)
            finally:
                sys.settrace(None)
            found.append(executed[0])
    return found


def test_lines_of_many_ranges() -> None:
    """A count, which no other load changes: a loop over a tenth of the ranges would be seen."""
    few, many = 200, 2_000
    for one, other in zip(
        run_child(lines_for, few).value,
        run_child(lines_for, many, budget_s=30).value,
        strict=True,
    ):
        assert other / many <= 1.1 * one / few
