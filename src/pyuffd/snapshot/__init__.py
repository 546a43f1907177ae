"""`Snapshot`: the memory of a running process at one instant, in files (layer L5).

docs/snapshots.md tells how it is taken, and describes the files; docs/core.md is about ELF cores.
"""

from __future__ import annotations

from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._core import CoreFile, write_core
from pyuffd.snapshot._format import RunState, SnapshotGap, SnapshotRegion, SnapshotRun
from pyuffd.snapshot._request import SnapshotReport
from pyuffd.snapshot._restore import Restore, RestoreStats
from pyuffd.snapshot._snapshot import Snapshot

__all__ = [
    "CoreFile",
    "Restore",
    "RestoreStats",
    "RunState",
    "Snapshot",
    "SnapshotGap",
    "SnapshotProgress",
    "SnapshotRegion",
    "SnapshotReport",
    "SnapshotRun",
    "write_core",
]
