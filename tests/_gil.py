"""Tests that need a Python with a GIL, or without one."""

from __future__ import annotations

import sys

import pytest

from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked


def needs_gil(there: bool) -> pytest.MarkDecorator:
    """Skip the test unless this Python has a GIL, or unless it has none."""
    key, found = ("gil", "free-threaded") if there else ("free-threaded", "with a GIL")

    def missing() -> tuple[list[str], str]:
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        return ([], "") if has_gil == there else ([key], f"this Python is {found}")

    return marked(Need("a Python with a GIL" if there else "a free-threaded Python", missing))
