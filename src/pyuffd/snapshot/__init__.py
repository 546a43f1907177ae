"""`Snapshot`: the memory of a running process at one instant, in files (layer L5).

docs/snapshots.md tells how it is taken, and describes the files.
"""

from __future__ import annotations
