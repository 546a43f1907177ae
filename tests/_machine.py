"""Huge pages and swap for a session of tests: the conformance suite's way of taking them."""

from __future__ import annotations

from pyuffd.testing._machine import (
    HUGE_PAGES_PER_WORKER,
    STATE,
    Entry,
    Reservation,
    reserve,
)

__all__ = ["HUGE_PAGES_PER_WORKER", "STATE", "Entry", "Reservation", "reserve"]
