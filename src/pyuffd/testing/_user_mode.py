"""Tests where the faults of user code are all that this user may handle (UFFD_USER_MODE_ONLY)."""

from __future__ import annotations

from typing import Any

from pyuffd._uffd import Userfaultfd
from pyuffd.testing._child import FaultingChild
from pyuffd.testing._opening import only_user_mode, set_making_do


def make_do(*, strictly: bool) -> None:
    """Let the tests of this process make do with the faults of user code, if these are all.

    `Userfaultfd` and `FaultingChild` then open such descriptors unless they are told otherwise,
    and so do the needs; a test that needs more says so with needs_kernel_faults().

    Args:
        strictly: Nothing may be left out: change nothing, so that what needs privilege fails.
    """
    set_making_do(not strictly)
    if not only_user_mode():
        return
    for opener in (Userfaultfd, FaultingChild):
        function: Any = opener.__init__
        function.__kwdefaults__["user_mode_only"] = True
