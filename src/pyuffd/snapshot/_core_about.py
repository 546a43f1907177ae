"""What a core tells about a process besides its memory: notes of the process and its threads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyuffd.snapshot import _core_elf as elf

if TYPE_CHECKING:
    from pyuffd.remote import Mapping, Process, RegisterSet

_US_PER_TICK = 1_000_000 // os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat behind the name, from `state` on.
_PARENT, _GROUP, _SESSION, _FLAGS, _TIMES, _NICE = 1, 2, 3, 6, 11, 16


@dataclass(frozen=True, slots=True)
class _Ids:
    """Ids as the process itself sees them, in its PID namespace, as in the kernel's cores."""

    parent: int
    group: int
    session: int


class About:
    """What is read while the process runs: nothing of it is an image of one instant.

    Ids, the command line and the times used do not change a core's meaning when they are some
    milliseconds old, and reading them for each thread would make the stop longer. A thread that is
    made afterwards is read later.
    """

    def __init__(self, process: Process) -> None:
        self._pid = pid = process.pid
        self._status = _status(f"/proc/{pid}/status")
        self._stats: dict[int, list[str]] = {}
        self._tids: dict[int, int] = {}
        self._nested = len(self._status["NSpid"].split()) > 1
        self._name = b""
        self._stat = self._read(pid)
        self.auxv = Path(f"/proc/{process.memory_tid}/auxv").read_bytes()
        self._arguments = Path(f"/proc/{process.memory_tid}/cmdline").read_bytes()
        self._ids = self._own_ids()
        for tid in self.tids():
            self._read(tid)

    @property
    def name(self) -> str:
        """The process's name."""
        return os.fsdecode(self._name)

    def tids(self) -> list[int]:
        """Return the process's threads now, its first one first."""
        found = [int(name) for name in os.listdir(f"/proc/{self._pid}/task")]
        return sorted(found, key=lambda tid: (tid != self._pid, tid))

    def notes(self, registers: Iterable[RegisterSet], mappings: Iterable[Mapping]) -> bytes:
        """Return all notes, in the kernel's order: those of the process come with thread one."""
        sets = {one.tid: one for one in registers}
        order = sorted(sets, key=lambda tid: (tid != self._pid, tid))
        parts: list[bytes] = []
        for index, tid in enumerate(order):
            status, *others = self._thread(sets[tid])
            parts.append(status)
            if not index:
                parts += (self._prpsinfo(), elf.note(elf.NT_AUXV, self.auxv), _files(mappings))
            parts += others
        return b"".join(parts)

    def _read(self, tid: int) -> list[str]:
        """Return the fields of a thread's stat; zeros for one that has ended."""
        if (known := self._stats.get(tid)) is not None:
            return known
        try:
            raw = Path(f"/proc/{self._pid}/task/{tid}/stat").read_bytes()
            before, _, after = raw.rpartition(b")")
            if tid == self._pid:
                self._name = before.partition(b"(")[2]
            if self._nested:
                self._tids[tid] = int(
                    _status(f"/proc/{self._pid}/task/{tid}/status")["NSpid"].split()[-1]
                )
        except (OSError, KeyError):
            return ["0"] * 50
        self._stats[tid] = after.decode().split()
        return self._stats[tid]

    def _own_ids(self) -> _Ids:
        stat = self._stat
        if not self._nested:
            return _Ids(int(stat[_PARENT]), int(stat[_GROUP]), int(stat[_SESSION]))
        depth = len(self._status["NSpid"].split())
        try:
            parents = _status(f"/proc/{stat[_PARENT]}/status")["NSpid"].split()
        except (OSError, KeyError):
            parents = []
        return _Ids(
            int(parents[-1]) if len(parents) == depth else 0,
            int(self._status["NSpgid"].split()[-1]),
            int(self._status["NSsid"].split()[-1]),
        )

    def _thread(self, registers: RegisterSet) -> Iterator[bytes]:
        stat, ids = self._read(registers.tid), self._ids
        yield elf.prstatus(
            tid=self._tids.get(registers.tid, registers.tid),
            parent=ids.parent,
            group=ids.group,
            session=ids.session,
            pending=registers.pending,
            blocked=registers.blocked,
            times_us=[int(ticks) * _US_PER_TICK for ticks in stat[_TIMES : _TIMES + 4]],
            registers=registers.general,
            has_floating=not registers.partial,
        )
        yield elf.siginfo(registers.stop_signal)
        if not registers.partial:
            yield elf.note(elf.NT_FPREGSET, registers.floating)
        if registers.extended:
            yield elf.note(elf.NT_X86_XSTATE, registers.extended, b"LINUX")

    def _prpsinfo(self) -> bytes:
        stat, ids = self._stat, self._ids
        return elf.prpsinfo(
            state=stat[0],
            nice=int(stat[_NICE]),
            flags=int(stat[_FLAGS]),
            uid=int(self._status["Uid"].split()[0]),
            gid=int(self._status["Gid"].split()[0]),
            pid=self._tids.get(self._pid, self._pid),
            parent=ids.parent,
            group=ids.group,
            session=ids.session,
            name=self._name,
            arguments=self._arguments or self._name,
        )


def _status(path: str) -> dict[str, str]:
    lines = Path(path).read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _files(mappings: Iterable[Mapping]) -> bytes:
    return elf.files(
        # maps writes a newline in a path as \012.
        (m.start, m.end, m.offset, os.fsencode(m.path).replace(b"\\012", b"\n"))
        for m in mappings
        if m.device
    )
