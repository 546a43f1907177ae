"""The place of the inline driver's SIGBUS handler among those of others (layer L4)."""

from __future__ import annotations

import faulthandler

from pyuffd._errors import raise_errno
from pyuffd._shim import lib

_under_faulthandler: list[bool] = []  # whether it was enabled when it had replaced our action


def faulthandler_left() -> bool:
    """Return whether faulthandler replaced our action and was disabled since.

    Its action below ours then does nothing.
    """
    return bool(_under_faulthandler) and _under_faulthandler[-1] and not faulthandler.is_enabled()


def ensure_inline_handler() -> bool:
    """Install the SIGBUS handler again if another one replaced it; return whether one did."""
    if lib.uffd_inline_is_installed():
        return False
    _under_faulthandler[:] = [faulthandler.is_enabled()]
    code = lib.uffd_inline_reinstall()
    if code:
        raise_errno("sigaction(SIGBUS)", -code)
    return True
