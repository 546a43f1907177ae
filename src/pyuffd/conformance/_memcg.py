"""Memory control groups: limit the memory of one process for a while."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyuffd.testing._need import Lack, Need


@contextlib.contextmanager
def limited_memory(limit: int, pid: int = 0) -> Iterator[None]:
    """Move a process, this one by default, to a new control group with this limit, and back.

    Raises:
        Lack: there is no memory controller that this user may use.
    """
    parent, old = memory_group()
    try:
        group = Path(tempfile.mkdtemp(prefix="pyuffd-", dir=parent))
    except OSError as error:
        raise Lack(["memcg"], f"no control group can be made in {parent}: {error}") from error
    try:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (group / name).exists():
                (group / name).write_text(str(limit))
                break
        else:
            raise Lack(["memcg"], f"{parent} does not hand the memory controller on")
        (group / "cgroup.procs").write_text(str(pid or os.getpid()))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                (old / "cgroup.procs").write_text(str(pid or os.getpid()))
    finally:
        group.rmdir()


def memory_group() -> tuple[Path, Path]:
    """Return the folder to make a group in, and the group of this process."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return root / "memory", root / "memory" / path.lstrip("/")
    if (root / "cgroup.controllers").exists():
        old = root / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        with contextlib.suppress(OSError):
            (root / "cgroup.subtree_control").write_text("+memory")
        return root, old
    raise Lack(["memcg"], "there is no memory controller")


def needs_memcg() -> Need:
    """A memory control group can be made."""

    def missing() -> tuple[list[str], str]:
        try:
            parent, _ = memory_group()
        except Lack as lack:
            return lack.keys, lack.reason
        can = os.access(parent, os.W_OK)
        return ([] if can else ["memcg"]), f"{parent} is not writable"

    return Need("a memory control group", missing)
