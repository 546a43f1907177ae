"""The conformance suite that the package ships, collected with the other tests."""

from __future__ import annotations

from pyuffd.conformance.test_suite import test

__all__ = ["test"]
