"""`write_core`: an ELF core of a running process."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyuffd._arguments import check_seconds
from pyuffd._errors import raise_errno
from pyuffd.snapshot import _core_copy, _core_elf, _core_plan
from pyuffd.snapshot._core_about import About
from pyuffd.snapshot._core_file import NewFile

if TYPE_CHECKING:
    from pyuffd.pagemap import PageRanges
    from pyuffd.remote import Mapping, Process

METHODS = ("auto", "stopped")
_FIRST = _core_elf.PAGE_SIZE  # where memory begins in the file; the header is before it


@dataclass(frozen=True, slots=True)
class CoreFile:
    """The result of `write_core`.

    Attributes:
        path: The file.
        method: How the memory was copied: "stopped".
        reason: Why so.
        threads: Threads in it.
        mappings: Mappings in it.
        bytes: Bytes of memory in it that are not holes.
        length: The length of the file in bytes, with its holes.
        pause_s: How long the process stood.
        seconds: How long all of it lasted.
        lost: Pages that could not be read, which are zeros in the file: poisoned, or behind the end
            of a mapped file.
        partial: Threads whose registers are not all known: they wait in vfork(2) for their child.
        unseen: Shared memory of which only those pages are in the file that the process had touched
            itself: without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE others are not seen.
    """

    path: str
    method: str
    reason: str
    threads: int
    mappings: int
    bytes: int
    length: int
    pause_s: float
    seconds: float
    lost: PageRanges
    partial: tuple[int, ...]
    unseen: tuple[Mapping, ...]


def write_core(
    process: Process,
    path: str | Path,
    *,
    method: str = "auto",
    full: bool = False,
    max_stall_s: float | None = None,
    durable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CoreFile:
    """Write an ELF core of a running process, which runs on afterwards.

    Debuggers open it as they open the core of a crash: memory, and the registers of all threads, of
    one instant. The file is sparse. It gets its name when it is complete, has mode 0600, and
    replaces nothing.

    Args:
        process: The process.
        path: Where to put it. A link there is not followed.
        method: "stopped" copies while the process stands; "auto" chooses.
        full: Write all memory that can be read, whatever the process's coredump_filter and
            MADV_DONTDUMP say. Without it, a core has what the kernel's own would have, see core(5).
        max_stall_s: The longest time that the process may stand; None: as long as the copy lasts.
        durable: Wait until the file is on the disk.
        progress: Called with the bytes copied and the bytes in all, often, in the thread of the
            caller. An exception of it ends the writing.

    Returns:
        What was written, and for how long the process stood.

    Raises:
        ValueError: an unknown method, a path that is no file name, or this process itself.
        FileExistsError: EEXIST - something has this name.
        UffdOSError: ETIMEDOUT - `max_stall_s` is over; ENOEXEC - a 32-bit program; ENOSPC, EIO -
            writing failed.
        OSError: the folder cannot be written.
        StopTimeoutError, UffdPermissionError: as `Process.stopped` raises them.
        ProcessGoneError: ESRCH - it has exited, or replaced its memory.
        After each of them the process runs, and there is no file.

    Kernel: PTRACE_GETREGSET of ptrace(2), process_vm_readv(2), PAGEMAP_SCAN (Linux 6.7).
    GIL: released.  Blocks: until it is written.

    Example:
        >>> import subprocess, tempfile
        >>> from pyuffd import Process, write_core
        >>> with subprocess.Popen(["sleep", "60"]) as child, Process(child.pid) as process:
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         core = write_core(process, f"{folder}/core.sleep")
        ...     child.kill()
        >>> core.threads
        1
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if max_stall_s is not None:
        max_stall_s = check_seconds("max_stall_s", max_stall_s)
        if not max_stall_s:
            raise ValueError("max_stall_s 0 leaves no time to stop the process")
    if process.pid == os.getpid():
        raise ValueError("a process cannot write a core of itself: it would have to stop")
    begin = time.monotonic()
    process.check()
    with NewFile(path) as file:
        core = _Core(process, file, full=full, max_stall_s=max_stall_s, progress=progress)
        core.prepare()
        core.take()
        core.finish()
        process.check()
        file.publish(durable=durable)
        return core.result(time.monotonic() - begin)


class _Core:
    """A core that is being written."""

    def __init__(
        self,
        process: Process,
        file: NewFile,
        *,
        full: bool,
        max_stall_s: float | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._process = process
        self._file = file
        self._full = full
        self._max_stall_s = max_stall_s
        self._progress = progress
        self._bytes = 0
        self._length = 0
        self._pause_s = 0.0

    def prepare(self) -> None:
        """Read what need not be of the same instant."""
        process = self._process
        try:
            self._about = About(process)
            self._filter = _core_plan.read_filter(process.pid)
        except OSError as error:
            process.check()
            raise_errno(
                f"read {error.filename}",
                error.errno or errno.EIO,
                hint="looking at another user's process needs CAP_SYS_PTRACE",
            )
        self._flags = _core_plan.Flags(process.mappings(details=True))

    def take(self) -> None:
        """Stop the process, and read its registers and its memory."""
        with self._process.stopped() as stop:
            self._clock = _core_copy.Clock(stop.since, self._max_stall_s)
            registers = stop.registers()
            tids = set(self._about.tids())
            self._registers = [one for one in registers if one.tid in tids]
            self._memory = _core_copy.look(
                self._process, self._flags, self._filter, full=self._full
            )
            self._segments = _core_plan.lay_out(self._memory.parts, self._memory.data, _FIRST)
            self._lost = _core_copy.copy(
                self._process, self._memory, self._segments, self._file.fileno(), self._tell
            )
        self._pause_s = time.monotonic() - stop.since

    def _tell(self, count: int) -> None:
        self._bytes += count
        of = self._memory.data.bytes
        self._clock.check(self._bytes, of)
        if self._progress is not None:
            self._progress(self._bytes, of)

    def finish(self) -> None:
        """Write notes and headers behind the memory, and the ELF header at last."""
        fd = self._file.fileno()
        end = max((part.offset + part.size for part in self._segments), default=_FIRST)
        notes_at = max(end, _FIRST)
        notes = self._about.notes(self._registers, (one.mapping for one in self._memory.parts))
        phdrs_at = notes_at + len(notes) + -len(notes) % 8
        headers = _core_elf.program_headers(notes_at, len(notes), self._segments)
        count = len(self._segments) + 1
        shdr_at = phdrs_at + len(headers)
        tail = notes.ljust(phdrs_at - notes_at, b"\0") + headers + _core_elf.section_header(count)
        _core_copy.write(fd, tail, notes_at)
        _core_copy.write(fd, _core_elf.elf_header(phdrs_at, count, shdr_at), 0)
        self._length = notes_at + len(tail)

    def result(self, seconds: float) -> CoreFile:
        """Return what the caller is told."""
        return CoreFile(
            path=self._file.path,
            method="stopped",
            reason="",
            threads=len(self._registers),
            mappings=len(self._memory.parts),
            bytes=self._bytes,
            length=self._length,
            pause_s=self._pause_s,
            seconds=seconds,
            lost=self._lost,
            partial=tuple(one.tid for one in self._registers if one.partial),
            unseen=tuple(self._memory.unseen),
        )
