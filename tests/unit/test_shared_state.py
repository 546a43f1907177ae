"""What several threads look at and change: one of them acts between two steps of another.

With the GIL most of these places are inside one step of the interpreter; without it none is.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import pytest

from pyuffd import EventsBusyError, RangeBusyError, RegisterMode, _event_claims, _left
from pyuffd._closing import CloseCallbacks, alive
from pyuffd._event_claims import EventClaims
from pyuffd._left import LeftBehind
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._bounce import Bounce
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import SourceFailure

PAGE = 4096
MEMORY = "this address space"


class JustEmptied(list[Any]):
    """A list whose last element another thread takes after it was seen."""

    def __bool__(self) -> bool:
        return True

    def __contains__(self, key: object) -> bool:
        return True


class Closes(CloseCallbacks):
    """Has callbacks and nothing to close."""

    _instead = "it is a test"
    _failed = "a test failed"

    def __init__(self) -> None:
        self._before_close = JustEmptied()


def test_a_callback_that_two_threads_forget() -> None:
    Closes()._forget_on_close(print)


def test_memory_that_another_thread_takes() -> None:
    handler = HandlerBase.__new__(HandlerBase)
    handler._bounces = JustEmptied()
    bounce = handler._bounce(PAGE, shared=False)
    assert isinstance(bounce, Bounce)
    bounce.close()
    handler._close_bounces()


class Failing:
    """A failure during whose comparison a worker notes another one."""

    length = PAGE

    def __init__(self, start: int, failures: deque[Any]) -> None:
        self._start, self._failures = start, failures

    @property
    def start(self) -> int:
        self._failures.appendleft(SourceFailure(ValueError("later"), 0, PAGE))
        return self._start


def test_a_failure_during_the_search_for_one() -> None:
    engine = WorkedEngine.__new__(WorkedEngine)
    failures: deque[Any] = deque()
    failures += [Failing(PAGE, failures), Failing(2 * PAGE, failures)]
    engine._raised = failures
    assert engine.failure_at(2 * PAGE) is failures[-1]


def leaving(start: int) -> LeftBehind:
    return LeftBehind(("uffd-w",), ((start, start + PAGE),), lambda: False, MEMORY, None)


class Leaves(LeftBehind):
    """Its thread leaves as another thread looks at its targets."""

    def __getattribute__(self, name: str) -> Any:
        if name == "targets" and self in _left._left:
            _left._left.remove(self)
        return super().__getattribute__(name)


def test_the_one_behind_a_thread_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Leaves(("uffd-v",), ((0, PAGE),), lambda: False, MEMORY, None)
    monkeypatch.setattr(_left, "_left", [first, leaving(PAGE)])
    with pytest.raises(RangeBusyError, match="uffd-w"):
        _left.check_target(PAGE, PAGE, MEMORY)


class Member:
    pass


@pytest.mark.parametrize("kind", ["set", "dict"])
def test_weak_members_while_others_are_added(kind: str) -> None:
    """Before Python 3.14 an iterator over them raises RuntimeError."""
    members: WeakSet[Member] = WeakSet()
    values: WeakKeyDictionary[Member, None] = WeakKeyDictionary()
    kept = [Member() for _ in range(200)]
    added: list[Member] = []

    def add(one: Member) -> None:
        members.add(one)
        values[one] = None

    for one in kept:
        add(one)
    is_over = threading.Event()

    def add_more() -> None:
        while not is_over.is_set() and len(added) < 20_000:
            added.append(Member())
            add(added[-1])

    other = threading.Thread(target=add_more)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        other.start()
        for _ in range(100):
            found = alive(members if kind == "set" else values)
            assert set(kept) <= set(found)
    finally:
        is_over.set()
        other.join()
        sys.setswitchinterval(before)


class FakeUffd:
    def fileno(self) -> int:
        return -1


class Owner:
    """Nothing of it is called."""

    def _registers(self, uffd: FakeUffd, start: int, length: int) -> None: ...
    def _unregistered(self, uffd: FakeUffd, start: int, length: int) -> None: ...
    def _served_mode(self, uffd: FakeUffd, start: int, length: int) -> RegisterMode | None:
        return None


def lines_of(function: Callable[[], None], at: int, call: Callable[[], None]) -> int:
    """Run `function`, and `call` before line `at` of `claim` in it; return how many it has."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        is_there = frame.f_code.co_filename == _event_claims.__file__
        if not is_there or frame.f_code.co_name != "claim":
            return None
        if event == "line":
            assert linecache.getline(_event_claims.__file__, frame.f_lineno)
            seen += 1
            if seen == at:
                call()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return seen


def claimed_twice(at: int) -> tuple[EventClaims[Any, Any], list[Owner], list[Owner], int]:
    """Claim events, and again in another thread before a line of that; return who got them."""
    claims: EventClaims[Any, Any] = EventClaims()
    owners, got = [Owner(), Owner()], []

    def claim(owner: Owner) -> None:
        try:
            claims.claim(FakeUffd(), owner)
        except ValueError:
            return
        got.append(owner)

    other = threading.Thread(target=claim, args=(owners[1],))

    def meanwhile() -> None:
        other.start()
        other.join(0.1)

    lines = lines_of(lambda: claim(owners[0]), at, meanwhile)
    if at:
        other.join()
    return claims, owners, got, lines


def test_two_threads_claim_the_events() -> None:
    *_, lines = claimed_twice(0)
    assert lines > 3
    for at in range(1, lines + 1):
        claims, _, got, _ = claimed_twice(at)
        assert len(got) == 1, f"line {at} of {lines}"
        assert claims.owner is got[0]


class TakenFrom(deque[Any]):
    """Another thread takes the last event after its number was looked at."""

    def __len__(self) -> int:
        return super().__len__() + 1


def test_events_that_two_threads_take() -> None:
    claims: EventClaims[Any, Any] = EventClaims()
    claims.unread = TakenFrom(["one", "two"])
    assert claims.take_unread(64) == ["one", "two"]
    assert claims.take_unread(64) == []


def test_claimed_events_are_refused() -> None:
    claims: EventClaims[Any, Any] = EventClaims()
    owner = Owner()
    claims.claim(FakeUffd(), owner)
    with pytest.raises(EventsBusyError):
        claims.check(FakeUffd())
