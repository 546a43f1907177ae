"""Fault handlers: `Handler` and its drivers, which resolve faults (layer L4)."""

from __future__ import annotations

from pyuffd.handlers._checkpoint import Checkpoint, StateRange, StateRanges
from pyuffd.handlers._fault_log import FaultLog, LoggedFault
from pyuffd.handlers._handler import Handler
from pyuffd.handlers._types import HandlerStats, Latency, PageState, RecentFault

__all__ = [
    "Checkpoint",
    "FaultLog",
    "Handler",
    "HandlerStats",
    "Latency",
    "LoggedFault",
    "PageState",
    "RecentFault",
    "StateRange",
    "StateRanges",
]
