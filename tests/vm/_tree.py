"""The source tree from which kernels are built, and copies of it that may be changed."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
from pathlib import Path

from tests.vm import _debian

# The series that is built unless the user has a tree.
SERIES = "6.12"
OWN = "PYUFFD_KERNEL_SOURCE"

# Not part of the source: its history, and the output of builds.
_IGNORED = re.compile(
    "|".join(
        fnmatch.translate(pattern)
        for pattern in (
            *(".git", ".config*", "*.o", "*.a", "*.ko", ".*.cmd", ".*.d", "*.mod", "*.mod.c"),
            *("vmlinux", "vmlinux.bin*", "bzImage", "generated", "Module.symvers"),
        )
    )
)


def own() -> Path | None:
    """Return the user's tree, if any."""
    name = os.environ.get(OWN)
    return Path(name).resolve() if name else None


def pristine() -> Path:
    """Return the user's tree, or Debian's.

    Raises:
        _debian.KernelNotFoundError: there is no such tree, or as for `_debian.source`.
    """
    tree = own() or _debian.source(SERIES)
    if not (tree / "fs/userfaultfd.c").exists():
        raise _debian.KernelNotFoundError(f"{tree} has no source of a kernel in it")
    return tree


def copy(source: Path, name: str) -> Path:
    """Return a copy of a tree in the cache, updated with what has changed in the tree.

    Build output in the copy is kept, so that only the rest is built again.
    """
    folder = _debian.cache_dir() / "source"
    key = "" if source.parent == folder else hashlib.sha256(bytes(source)).hexdigest()[:8] + "."
    tree = folder / f"{source.name}.{key}{name}"
    for place, folders, files in os.walk(source):
        target = tree / os.path.relpath(place, source)
        target.mkdir(parents=True, exist_ok=True)
        folders[:] = [one for one in folders if not _IGNORED.match(one)]
        links = [one for one in folders if os.path.islink(f"{place}/{one}")]
        for one in (*files, *links):
            if not _IGNORED.match(one):
                _renew(Path(place, one), target / one)
    return tree


def _renew(source: Path, target: Path) -> None:
    """Copy a file unless the copy is as new or newer, as files changed by these tools are."""
    if source.is_symlink():
        if not target.is_symlink():
            target.symlink_to(os.readlink(source))
    elif not target.exists() or source.stat().st_mtime_ns > target.stat().st_mtime_ns:
        # In one step: a partial copy would look up to date forever.
        partial = target.with_name(f"{target.name}.partial")
        shutil.copy2(source, partial)
        partial.replace(target)
