"""Estimates of how long a stop will take, for a command's first line (layer L6)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pyuffd import Mapping, MappingKind, Process
from pyuffd.cli._progress import MIB

# The time to stop a thread, read its registers and let it continue. Measured with 2000 threads: 30
# microseconds, and 100 on a busy machine.
THREAD_S = 30e-6
# During the stop the mappings are read and compared, and then their page tables are walked. That
# takes about twice as long as reading the mappings.
AS_LONG_AS_READING = 2
# Copying everything in the stop needs so much more for each mapping, by the same measure: 10 to 16
# times as long as reading 20,000 of them.
COPIED_AS_LONG = 8
# What every stop needs.
STOP_S = 0.01
# How fast memory is copied to a file on an idle machine, in bytes per second.
COPY_RATE = 1 << 30
# How fast shared memory is read again and compared with its copy: 512 MiB in 0.2 s.
COMPARE_RATE = 5 << 29
BLOCK = 512  # of st_blocks
RESIDENT = ("RssAnon", "RssShmem", "VmSwap")
FILTER_SHARED_FILES = 1 << 3  # of coredump_filter


def limited_pause(target: Process, limit_s: float, condition: str = "", shared: int = 0) -> str:
    """Say how long a process will be stopped under a limit, and warn if the limit is too low.

    Every method stops the threads and reads the mappings, so reading them is timed here.
    `shared`: bytes that are compared with their copy during the stop, without a limit.
    """
    threads, count, seconds = needed(target)
    text = f"for at most {limit_s:g} s{condition}"
    if shared:
        text += (
            f", and then while its shared memory is read again: {shared / MIB:.0f} MiB,"
            f" {shared / COMPARE_RATE:.2f} s or more"
        )
    if seconds <= limit_s:
        return text
    return (
        f"{text}; but stopping its threads ({threads}) and reading its mappings ({count}) alone"
        f" takes {seconds:.2f} s"
    )


def whole_pause(target: Process) -> float:
    """Return for how many seconds a process will be stopped if all of its memory is copied then."""
    _, _, seconds = needed(target, COPIED_AS_LONG)
    return resident(target.memory_tid) / COPY_RATE + STOP_S + seconds


def resident(pid: int) -> int:
    """Return how many bytes of its own a process has, on swap too."""
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[key].split()[0]) << 10 for key in RESIDENT if key in fields)


def shared_memory(target: Process, *, files: bool = False) -> int:
    """Return how many bytes of memory that other processes may write are mapped and in use.

    `files`: also mappings of files on disks.
    """
    kinds = {MappingKind.SHMEM, MappingKind.HUGETLB}
    if files:
        kinds.add(MappingKind.SHARED_FILE)
    return sum(_allocated(target, m) for m in target.mappings() if m.shared and m.kind in kinds)


def has_shared_files(target: Process) -> bool:
    """Return whether a core of a process has its shared mappings of files; see core(5)."""
    text = Path(f"/proc/{target.pid}/coredump_filter").read_text()
    return bool(int(text or "0", 16) & FILTER_SHARED_FILES)


def _allocated(target: Process, mapping: Mapping) -> int:
    """Return how many bytes of a mapping its file may have; all of it if we may not ask."""
    name = f"{mapping.start:x}-{mapping.end:x}"
    try:
        blocks = os.stat(f"/proc/{target.memory_tid}/map_files/{name}").st_blocks
    except OSError:
        return mapping.length
    return min(mapping.length, blocks * BLOCK)


def needed(target: Process, as_reading: int = AS_LONG_AS_READING) -> tuple[int, int, float]:
    """Return how many threads and mappings a process has, and how long they keep it stopped.

    `as_reading`: how many times as long as reading the mappings everything takes that is done for
    each of them.
    """
    threads = len(target.threads())
    begin = time.perf_counter()
    count = len(target.mappings())
    seconds = (time.perf_counter() - begin) * as_reading
    return threads, count, seconds + threads * THREAD_S
