"""Find out why no huge page could be allocated: the pool, the mount or the cgroup (layer L2).

The kernel allocates a page for the process that fills it, so the cgroup is that of the calling
process, while the mount is that of the mapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from pyuffd import _limits, _machine
from pyuffd._vmas import Vma

_DELETED = " (deleted)"
_UNITS = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB"))
# The files of a cgroup: version 2 and version 1.
_FILES = (("max", "current"), ("limit_in_bytes", "usage_in_bytes"))


def why_none(vma: Vma, pid: int | str = "self", *, needed: int = 1) -> str:
    """Return the limits that a huge page of a mapping meets; the state of the pool if none is met.

    `pid` is the process that the mapping belongs to.
    """
    pool = _machine.shortage(vma.page_size, needed, -1)
    met = "; ".join(limits_met(vma, pid, needed=needed))
    return met or f"{pool}, and neither its mount nor a cgroup has reached its limit now"


def limits_met(vma: Vma, pid: int | str = "self", *, needed: int = 1) -> list[str]:
    """Return the limits that a huge page of a mapping meets."""
    met = [*_full_mount(vma, pid, needed), *_full_cgroups(vma.page_size, needed)]
    if _machine.free_pages(vma.page_size) < needed:
        met.append(_machine.shortage(vma.page_size, needed, -1))
    return met


def _full_mount(vma: Vma, pid: int | str, needed: int) -> Iterator[str]:
    """Yield that the mount of a file (`mount -t hugetlbfs -o size=`) has too few pages left."""
    if not vma.path.startswith("/") or vma.path.startswith(("/memfd:", "/anon_hugepage", "/SYSV")):
        return
    path = vma.path.removesuffix(_DELETED)
    root = f"/proc/{pid}/root"
    for place in (
        f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}",  # needs a capability
        root + path,
        root + os.path.dirname(path),  # of a file without a name
    ):
        with suppress(OSError):
            if os.stat(place).st_dev != vma.device:
                continue
            mount = os.statvfs(place)
            # Without a limit both numbers are 0 or huge.
            if mount.f_blocks > 0 and mount.f_bfree < needed:
                yield (
                    f"the hugetlbfs mount of {path} has {mount.f_bfree} of its {mount.f_blocks}"
                    " pages left: use a mount with a larger size="
                )
            return


def _full_cgroups(page_size: int, needed: int) -> Iterator[str]:
    unit, name = next((unit, name) for unit, name in _UNITS if page_size >= unit)
    size = f"hugetlb.{page_size // unit}{name}"
    for folder, files in _limits.cgroups("hugetlb"):
        for limit_name, used_name in _FILES:
            with suppress(OSError, ValueError):  # "max" means no limit
                with open(f"{files}/{size}.{limit_name}") as limit_file:
                    limit = int(limit_file.read())
                with open(f"{files}/{size}.{used_name}") as used_file:
                    used = int(used_file.read())
                if used + needed * page_size > limit:
                    yield (
                        f"{size}.{limit_name} of the cgroup {folder} is {limit}, and {used} bytes"
                        " are used: raise it"
                    )
