"""What the owner may ask of the helper process, and what comes back (layer L4)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple


class Call(IntEnum):
    """What the owner asks: a method of `Backend`, or what only the process driver needs."""

    HELLO = auto()
    ADD_SPACE = auto()
    FIND_SPACE = auto()
    REMOVE_SPACE = auto()
    ADD = auto()
    FIND = auto()
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
    TAKE_IN = auto()
    WRITEPROTECT = auto()
    STATES = auto()
    SPACES = auto()
    OWNER_EXITED = auto()
    SOURCE_FAILURE = auto()
    STATS = auto()
    RECENT = auto()
    FAILURE = auto()
    PIDS = auto()
    REPLACE = auto()  # a worker that does not answer
    CLOSE = auto()
    ORPHAN = auto()  # the keeper's: the owner is gone


class Answer(IntEnum):
    """What comes back: DONE and REFUSED for a call, the others unasked (number 0)."""

    DONE = auto()
    REFUSED = auto()
    BROKEN = auto()  # the worker ends with this exception
    REPLAYED = auto()  # it has applied what the one before had read
    FAILED = auto()  # a source raised this
    DIED = auto()  # the helper ends with this exception
    WARNING = auto()


@dataclass(frozen=True, slots=True)
class Kind:
    """How a call is treated on its way.

    `waits`: for others, so that a thread of its own answers it. `changes_book`: the keeper notes
    what came of it. `has_fds`: descriptors come with it.
    """

    waits: bool = False
    changes_book: bool = False
    has_fds: bool = False


_PLAIN = Kind()
KINDS = {call: _PLAIN for call in Call} | {
    Call.ADD_SPACE: Kind(changes_book=True, has_fds=True),
    Call.REMOVE_SPACE: Kind(waits=True),
    Call.ADD: Kind(changes_book=True, has_fds=True),
    Call.SET_IOCTLS: Kind(changes_book=True),
    Call.UNSERVE: Kind(waits=True, changes_book=True),
    Call.START: Kind(changes_book=True),
    Call.END: Kind(waits=True, changes_book=True),
    Call.REFUSE: Kind(changes_book=True),
    Call.DRAIN: Kind(waits=True),
    Call.LIST_REGISTERED: Kind(waits=True),
    Call.UNLIST_REGISTERED: Kind(waits=True),
    Call.POPULATE: Kind(waits=True),
}


class Message(NamedTuple):
    """One message: which call it is or answers, what it says, and the pickled rest."""

    number: int
    word: int  # a `Call`, or an `Answer`
    body: bytes = b""
