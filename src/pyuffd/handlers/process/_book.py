"""What the keeper knows: enough for a worker to go on where another one died (layer L4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyuffd.handlers._types import EngineOptions, Piece, RangeSpec


@dataclass(slots=True)
class ServedBook:
    """A range that is served, and its descriptors; the last one holds its pages' states."""

    spec: RangeSpec
    fds: list[int]
    ioctls: int = 0
    closing_may_hang: bool = False  # it asks the server of a file system


@dataclass(slots=True)
class SpaceBook:
    """An address space: its userfaultfd, and where the pieces of its ranges are."""

    fd: int
    is_fork: bool
    layout_events: int
    owner_pid: int = 0  # 0: unknown, as of every fork
    states_fd: int = -1
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    expected: list[Piece] = field(default_factory=list)  # unmappings whose events are still to come


@dataclass(slots=True)
class Book:
    """What the keeper knows: enough to go on after a worker's death."""

    options: EngineOptions
    workers: int
    spaces: dict[int, SpaceBook] = field(default_factory=dict)
    served: dict[int, ServedBook] = field(default_factory=dict)
    cpus: list[int] | None = None  # of a started engine
    refusing: bool = False
    gave_up: bool = False  # refusing because workers died, not because the owner asked
    restarts: int = 0
    reported: int = 0  # the last layout event that a worker reported
    rescued: list[int] = field(default_factory=list)  # forks that the last one had not reported
