"""Fault handlers: who resolves faults, and when (layer L4)."""

from __future__ import annotations

from pyuffd.handlers._engine import HandlerStats, Latency, PageState, RecentFault
from pyuffd.handlers._handler import Handler

__all__ = ["Handler", "HandlerStats", "Latency", "PageState", "RecentFault"]
