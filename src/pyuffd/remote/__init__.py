"""`Process`: a running process, seen from outside and without its cooperation (layer L5).

Its mappings, memory, page table and threads; stopping it; a userfaultfd of its memory. What it
writes is tracked by `pyuffd.dirty`.
"""

from __future__ import annotations

from pyuffd.remote._mappings import Mapping, MappingKind, Mappings
from pyuffd.remote._process import Copied, Process
from pyuffd.remote._stop import RegisterSet, Stop
from pyuffd.remote._threads import Thread

__all__ = [
    "Copied",
    "Mapping",
    "MappingKind",
    "Mappings",
    "Process",
    "RegisterSet",
    "Stop",
    "Thread",
]
