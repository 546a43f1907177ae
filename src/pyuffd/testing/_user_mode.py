"""Tests of a user who may handle only faults of user code (UFFD_USER_MODE_ONLY)."""

from __future__ import annotations

from typing import Any

from pyuffd._uffd import Userfaultfd
from pyuffd.testing._child import FaultingChild
from pyuffd.testing._opening import only_user_mode, set_making_do


def make_do(*, strictly: bool) -> None:
    """Make the tests in this process use faults of user code, if this user may handle no others.

    `Userfaultfd`, `lazy` and `FaultingChild` then open such descriptors unless an argument says
    otherwise, and so do the needs. A test that needs more declares it with needs_kernel_faults().

    Args:
        strictly: No test may be skipped: change nothing, so that tests without privilege fail.
    """
    set_making_do(not strictly)
    if not only_user_mode():
        return
    from pyuffd._lazy import lazy  # imports every driver

    openers: list[Any] = [Userfaultfd.__init__, FaultingChild.__init__, lazy]
    for opener in openers:
        opener.__kwdefaults__["user_mode_only"] = True
