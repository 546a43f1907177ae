"""What is expected of a stop, for the first line of a command (layer L6)."""

from __future__ import annotations

import os
import time

from pyuffd import Mapping, MappingKind, Process
from pyuffd.cli._progress import MIB

# Stopping a thread, reading its registers and letting it go. Measured with 2000 threads: 30
# microseconds, and 100 on a busy machine.
THREAD_S = 30e-6
# In the stop they are read and compared, and then their page tables are walked.
AS_LONG_AS_READING = 2
# What memory is copied to a file with, in bytes a second, on a machine that is not busy.
COPY_RATE = 1 << 30
BLOCK = 512  # of st_blocks


def limited_pause(target: Process, limit_s: float, condition: str = "", shared: int = 0) -> str:
    """Say for how long a process is to stand under a limit, and what is too much for that.

    Its threads are stopped and its mappings are read, whatever the method is. So it is measured
    here how long reading lasts. `shared`: bytes that are copied in the stop without a limit.
    """
    threads, count, seconds = needed(target)
    text = f"for at most {limit_s:g} s{condition}"
    if shared:
        text += (
            f", and then while its shared memory is copied: {shared / MIB:.0f} MiB,"
            f" {shared / COPY_RATE:.2f} s or more"
        )
    if seconds <= limit_s:
        return text
    return (
        f"{text}; but stopping its threads ({threads}) and reading its mappings ({count}), which is"
        f" part of it, lasts {seconds:.2f} s"
    )


def shared_memory(target: Process) -> int:
    """Return how much of mapped memory that other processes may write has content, in bytes."""
    kinds = (MappingKind.SHMEM, MappingKind.HUGETLB)
    return sum(_allocated(target, m) for m in target.mappings() if m.shared and m.kind in kinds)


def _allocated(target: Process, mapping: Mapping) -> int:
    """Return how much of a mapping its file may have content for; all without the privilege."""
    name = f"{mapping.start:x}-{mapping.end:x}"
    try:
        blocks = os.stat(f"/proc/{target.memory_tid}/map_files/{name}").st_blocks
    except OSError:
        return mapping.length
    return min(mapping.length, blocks * BLOCK)


def needed(target: Process) -> tuple[int, int, float]:
    """Return how many threads and mappings a process has, and how long it stands for them."""
    threads = len(target.threads())
    begin = time.perf_counter()
    count = len(target.mappings())
    seconds = (time.perf_counter() - begin) * AS_LONG_AS_READING
    return threads, count, seconds + threads * THREAD_S
