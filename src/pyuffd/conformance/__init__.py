"""The conformance suite: what the kernel does with userfaultfd, case by case (layer L5).

A case is data (`Case`) and a function. `pyuffd conformance run`, or pytest with the plugin
`pyuffd.conformance.plugin`, runs the cases and reports a matrix of behaviour by memory type.
Unexpected behaviour is a failure, which prints what was seen.  Nothing here looks at a kernel
version: features, ioctls and hardware decide.

Listing cases and comparing reports needs no pytest; running them does
(`pip install pyuffd[testing]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyuffd.conformance._case import Case, case, load
from pyuffd.conformance._markdown import markdown
from pyuffd.conformance._report import Difference, Report, Result, compare
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._writing import write_report
from pyuffd.testing._memory_types import MemoryType

if TYPE_CHECKING:
    from pyuffd.conformance._context import Context
else:

    def __getattr__(name):
        """Import `Context` on first use: running cases needs it, listing them does not."""
        if name != "Context":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pyuffd.conformance._context import Context

        return Context


__all__ = [
    "Case",
    "Context",
    "Difference",
    "MemoryType",
    "Report",
    "Result",
    "Variant",
    "case",
    "compare",
    "load",
    "markdown",
    "write_report",
]
