"""`DirtyTracker`: which pages a process writes, round by round (layer L5).

docs/tracking.md tells what is seen and what is not.
"""

from __future__ import annotations

from pyuffd.dirty._blind import Blind, BlindReason
from pyuffd.dirty._layout import Grown, LayoutChange, Mapped, Moved, Protected, Unmapped
from pyuffd.dirty._round import DirtyRound
from pyuffd.dirty._tracker import DirtyTracker

__all__ = [
    "Blind",
    "BlindReason",
    "DirtyRound",
    "DirtyTracker",
    "Grown",
    "LayoutChange",
    "Mapped",
    "Moved",
    "Protected",
    "Unmapped",
]
