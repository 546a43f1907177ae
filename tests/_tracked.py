"""Which mappings one ioctl registers or unregisters, of those that a tracker registers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyuffd._dirty_calls import TrackedRows
from pyuffd._shim import lib

Span = tuple[int, int]


def runs(rows: TrackedRows) -> list[Span]:
    """Return start and end of what each ioctl is for."""
    found = []
    at = 0
    while at < len(rows):
        count = lib.uffd_arm_run(rows._vec + at, len(rows) - at)
        found.append((int(rows._vec[at].start), int(rows._vec[at + count - 1].end)))
        at += count
    return found


def note_runs(patch: pytest.MonkeyPatch, note: Callable[[str, list[Span]], object]) -> None:
    """Call `note` with "register" or "unregister", and the runs, of each such call."""
    for name in ("register", "unregister"):
        real = getattr(TrackedRows, name)

        def noted(self: TrackedRows, _name: str = name, _real: Any = real) -> None:
            note(_name, runs(self))
            _real(self)

        patch.setattr(TrackedRows, name, noted)
