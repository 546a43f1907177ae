"""Find what a piece of code leaves behind in this process."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A C thread stays visible in /proc for a moment after it is joined, and so does a reaped child.
SETTLE_S = 2.0
POLL_S = 0.005

_FIRST_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)")
# All kinds of shared memory and huge pages; other mappings come and go with malloc.
_MEMORY = re.compile(r"/memfd:|/dev/shm/|/dev/zero|/SYSV|/anon_hugepage")
# Registered with a userfaultfd: missing, write-protected, minor.
_REGISTERED = {"um", "uw", "ui"}


class LeakError(AssertionError):
    """Something was left behind; `leaks` lists it."""

    def __init__(self, leaks: list[str]) -> None:
        """Keep the list."""
        super().__init__("left behind: " + ", ".join(leaks))
        self.leaks = leaks

    def __reduce__(self) -> tuple[type[LeakError], tuple[list[str]]]:
        return type(self), (self.leaks,)


_THREAD = "thread "
# While a thread exits, a listing of /proc/self/task may miss another one. So remember all threads
# that were ever seen before a body.
_threads_before: set[str] = set()


@contextmanager
def no_leaks(
    *,
    fds: bool = True,
    mappings: bool = True,
    threads: bool = True,
    processes: bool = True,
    settle_s: float = SETTLE_S,
) -> Iterator[None]:
    """Check that the body leaves nothing behind in this process.

    If the body raises an exception, it propagates and nothing is checked.

    Args:
        fds: File descriptors.
        mappings: Shared memory (memfd, POSIX, huge pages), and memory registered with a
            userfaultfd. Plain anonymous memory is not checked, as the allocator uses it too.
        threads: Threads, including C threads.
        processes: Children that are running or were not reaped.
        settle_s: How long to wait for things that are just ending.

    Raises:
        LeakError: something exists that did not exist before. It is an AssertionError.

    GIL: held at times.  Threads: what other threads leak counts too.  Blocks: up to `settle_s`.

    Example:
        >>> from pyuffd import Region
        >>> from pyuffd.testing import no_leaks
        >>> with no_leaks():
        ...     Region.memfd(4096).close()
    """
    looks = [
        look
        for look, wanted in (
            (_fds, fds),
            (_mappings, mappings),
            (_threads, threads),
            (_processes, processes),
        )
        if wanted
    ]
    # Twice, as a listing may lack a thread.
    before = {name for _ in range(2) for look in looks for name in look()}
    _threads_before.update(name for name in before if name.startswith(_THREAD))
    before |= _threads_before
    yield
    deadline = time.monotonic() + settle_s
    while True:
        # On a busy machine this thread may not run again before the deadline, so always look once
        # more after it.
        is_late = time.monotonic() >= deadline
        leaks = [name for look in looks for name in look() if name not in before]
        if not leaks:
            return
        if is_late:
            raise LeakError(leaks)
        gc.collect()
        time.sleep(POLL_S)


def _fds() -> Iterator[str]:
    for fd in sorted(os.listdir("/proc/self/fd"), key=int):
        with suppress(FileNotFoundError):
            yield f"fd {fd} -> {os.readlink(f'/proc/self/fd/{fd}')}"


def _threads() -> Iterator[str]:
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/self/task/{thread}/comm").read_text().strip()
            yield f"{_THREAD}{thread} ({name})"


def _processes() -> Iterator[str]:
    for pid in sorted(child_pids()):
        name = "?"
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        yield f"process {pid} ({name})"


def _mappings() -> Iterator[str]:
    place = name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := _FIRST_LINE.match(line):
            start, end, name = match.groups()
            place = f"[{int(start, 16):#x}, +{int(end, 16) - int(start, 16):#x})"
        elif line.startswith("VmFlags:"):
            flags = set(line.split()[1:])
            if registered := flags & _REGISTERED:
                yield f"mapping {place} {name or 'anonymous'}, registered {sorted(registered)}"
            elif _MEMORY.match(name) or "ht" in flags:
                yield f"mapping {place} {name}"


def child_pids() -> set[int]:
    """Return the child processes of this process, including those that were not reaped."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            pids.update(map(int, (task / "children").read_text().split()))
    return pids
