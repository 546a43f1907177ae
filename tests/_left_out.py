"""One sentence for the end of a run: how many tests it left out, and how to run them."""

from __future__ import annotations

import os
import shutil

from pyuffd import KernelSupport, probe


def left_out(skipped: int, ran: int, support: KernelSupport | None = None) -> str:
    """Return the sentence, which depends on how this process can open a userfaultfd."""
    support = support or probe()
    why, command = _why(support)
    count = f"Left out {skipped:,} of {skipped + ran:,} tests: {why}"
    return f"{count}; to run all: {command}" if command else count


def _why(support: KernelSupport) -> tuple[str, str]:
    is_root = os.geteuid() == 0
    as_root = "" if is_root else "sudo make test" if shutil.which("sudo") else "make test, as root"
    if support.kernel_faults:
        return "the kernel, this user or the machine lack what they need", as_root
    way = support.opens["syscall"]
    if support.usable:
        return (
            f"here userfaultfd handles only the faults of user code ({way.reason})",
            as_root or way.command,
        )
    return f"no userfaultfd can be opened here ({way.reason})", way.command
