"""A kit for tests of userfaultfd programs: needs, faulting processes, injected faults (layer L5).

docs/testing.md shows how to use it.  pytest, if installed, loads the plugin automatically.  Only
the `needs*` functions need pytest (`pip install pyuffd[testing]`); the rest works with any runner.
"""

from __future__ import annotations

from pyuffd.testing._child import FaultingChild, FaultingChildError, ForkResult, Step
from pyuffd.testing._huge_pages import huge_pages
from pyuffd.testing._inject import (
    DelayedSource,
    FailingSource,
    GatedSource,
    PendingChange,
    WrongLengthSource,
    kill,
    layout_change_pending,
    layout_is_changing,
)
from pyuffd.testing._leaks import LeakError, child_pids, no_leaks
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType
from pyuffd.testing._needs import (
    needs,
    needs_hugepages,
    needs_ioctl,
    needs_privilege,
    needs_swap,
)
from pyuffd.testing._skips import require
from pyuffd.testing._swap import swap_out

__all__ = [
    "MEMORY_TYPES",
    "DelayedSource",
    "FailingSource",
    "FaultingChild",
    "FaultingChildError",
    "ForkResult",
    "GatedSource",
    "LeakError",
    "MemoryType",
    "PendingChange",
    "Step",
    "WrongLengthSource",
    "child_pids",
    "huge_pages",
    "kill",
    "layout_change_pending",
    "layout_is_changing",
    "needs",
    "needs_hugepages",
    "needs_ioctl",
    "needs_privilege",
    "needs_swap",
    "no_leaks",
    "require",
    "swap_out",
]
