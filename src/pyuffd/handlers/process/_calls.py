"""The calls that the owner makes to the helper processes, and the answers (layer L4)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple


class Call(IntEnum):
    """A call of the owner: a method of `Backend`, or one that only the process driver needs."""

    HELLO = auto()
    ADD_SPACE = auto()
    FIND_SPACE = auto()
    REMOVE_SPACE = auto()
    ADD = auto()
    FIND = auto()
    OPEN = auto()
    SET_IOCTLS = auto()
    LIST_REGISTERED = auto()
    UNLIST_REGISTERED = auto()
    UNSERVE = auto()
    START = auto()
    END = auto()
    HELD = auto()
    HURRY = auto()
    DRAIN = auto()
    REFUSE = auto()
    ABANDON = auto()
    POPULATE = auto()
    POPULATE_RANGES = auto()
    LOAD = auto()
    FILL = auto()
    TAKE_IN = auto()
    WRITEPROTECT = auto()
    STATES = auto()
    PAUSE = auto()
    RESUME = auto()
    RETRY = auto()
    SPACES = auto()
    OWNER_EXITED = auto()
    SOURCE_FAILURE = auto()
    STATS = auto()
    RECENT = auto()
    TAKE_FAULTS = auto()
    FAILURE = auto()
    FAILURE_AT = auto()
    PIDS = auto()
    REPLACE = auto()  # replace a worker process that does not answer
    CLOSE = auto()
    ORPHAN = auto()  # from the keeper: the owner is gone


class Answer(IntEnum):
    """An answer: DONE or REFUSED to a call, the others without a call (number 0)."""

    DONE = auto()
    REFUSED = auto()
    BROKEN = auto()  # the worker process ends with this exception
    REPLAYED = auto()  # the worker process has applied the events that its predecessor had read
    FAILED = auto()  # a source raised this exception
    DIED = auto()  # the keeper ends with this exception
    WARNING = auto()


@dataclass(frozen=True, slots=True)
class Kind:
    """How a call is handled.

    `waits`: it may wait for other threads, so it is answered in a thread of its own.
    `changes_book`: the keeper notes its result. `has_fds`: it comes with descriptors.
    """

    waits: bool = False
    changes_book: bool = False
    has_fds: bool = False


_PLAIN = Kind()
KINDS = {call: _PLAIN for call in Call} | {
    Call.ADD_SPACE: Kind(changes_book=True, has_fds=True),
    Call.REMOVE_SPACE: Kind(waits=True),
    Call.ADD: Kind(changes_book=True, has_fds=True),
    Call.OPEN: Kind(waits=True, changes_book=True, has_fds=True),
    Call.SET_IOCTLS: Kind(changes_book=True),
    Call.UNSERVE: Kind(waits=True, changes_book=True),
    Call.START: Kind(changes_book=True),
    Call.END: Kind(waits=True, changes_book=True),
    Call.REFUSE: Kind(changes_book=True),
    Call.DRAIN: Kind(waits=True),
    Call.LIST_REGISTERED: Kind(waits=True, changes_book=True),
    Call.UNLIST_REGISTERED: Kind(waits=True, changes_book=True),
    Call.POPULATE: Kind(waits=True),
    Call.POPULATE_RANGES: Kind(waits=True),
    Call.LOAD: Kind(waits=True),
    Call.PAUSE: Kind(waits=True),
    Call.RETRY: Kind(waits=True),
    Call.FILL: Kind(waits=True, has_fds=True),
}


class Message(NamedTuple):
    """One message: the number of the call that it is or answers, its kind, and a body.

    The body is what `_wire.packed` or `_wire.pickled_error` returns.
    """

    number: int
    word: int  # a `Call`, or an `Answer`
    body: bytes = b""
