"""The module in which pytest collects the cases, one test per case and memory type (layer L5)."""

from __future__ import annotations

import pytest

from pyuffd.conformance.plugin import run_case


def test(request: pytest.FixtureRequest, uffd_case: tuple[str, str]) -> None:
    """Run one case on one memory type."""
    run_case(request.node.stash, *uffd_case)
