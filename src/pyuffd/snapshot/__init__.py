"""`Snapshot`: the memory of a running process at one instant, in files (layer L5).

docs/snapshots.md tells how it is taken, and describes the files; docs/core.md is about ELF cores.
"""

from __future__ import annotations

from pyuffd.snapshot._core import CoreFile, write_core

__all__ = ["CoreFile", "write_core"]
