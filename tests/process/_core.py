"""Targets whose cores are examined, and a reader of cores by pyelftools."""

from __future__ import annotations

import signal
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from elftools.elf.elffile import ELFFile

from pyuffd import Process
from pyuffd.testing._run import SCALE
from tests.process._attach import status

PAGE = 4096
_PAUSE = "34"  # the system call, in /proc/PID/task/TID/syscall


@dataclass
class Target:
    """A program of core_target.c that is ready."""

    program: str
    popen: subprocess.Popen[bytes]
    places: dict[str, tuple[int, int]]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @classmethod
    def start(cls, program: str, *words: object) -> Self:
        popen = subprocess.Popen([program, *map(str, words)], stdout=subprocess.PIPE)
        self = cls(program, popen, {})
        self.read_places()
        return self

    def read_places(self) -> None:
        """Read what it prints, until it is ready."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line == b"ready\n":
                return
            name, start, length = line.decode().split()
            self.places[name] = int(start, 16), int(length, 16)
        raise AssertionError(f"{self.popen.args!r} ended: {self.popen.wait()}")

    def go_on(self) -> None:
        """Let it take its next step, and wait until it is ready again."""
        self.popen.send_signal(signal.SIGUSR1)
        self.read_places()

    def all_pause(self) -> bool:
        """Whether each thread of mode "threads" has reached its last step."""
        calls = Path(f"/proc/{self.pid}/task").glob("*/syscall")
        return all(call.read_text().split()[0] == _PAUSE for call in calls)

    def vector_is_loaded(self) -> bool:
        """Whether mode "vector" has reached its loop, with the value in ymm9."""
        with Process(self.pid) as process, process.stopped(10 * SCALE) as stop:
            extended = stop.registers()[0].extended
        low, high = extended[160 + 9 * 16 :][:16], extended[576 + 9 * 16 :][:16]
        return struct.unpack("<4Q", low + high) == (0x1111, 0x2222, 0x3333, 0x4444)

    def runs(self) -> bool:
        """Whether it is alive and untraced."""
        found = status(self.pid)
        return self.popen.poll() is None and found["TracerPid"] == "0"

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


def pages(length: int, first: int) -> bytes:
    """Return what core_target.c's fill() writes."""
    return b"".join(bytes([first + at % 100 + 1]) * PAGE for at in range(length // PAGE))


class Core:
    """A core file."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - close() closes it
        self.elf = ELFFile(self._file)
        self.loads: list[Any] = [s for s in self.elf.iter_segments() if s["p_type"] == "PT_LOAD"]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def load(self, address: int) -> Any:
        """Return the segment that holds an address."""
        found = self._holding(address)
        assert len(found) == 1, f"{len(found)} segments hold {address:#x}"
        return found[0]

    def _holding(self, address: int) -> list[Any]:
        return [s for s in self.loads if 0 <= address - s["p_vaddr"] < s["p_memsz"]]

    def read(self, address: int, length: int) -> bytes | None:
        """Return memory; None if it is not mapped, or the file lacks a part of it."""
        result = b""
        while length:
            if not self._holding(address):
                return None
            part = self.load(address)
            inside = address - part["p_vaddr"]
            count = min(length, part["p_memsz"] - inside)
            if inside + count > part["p_filesz"]:
                return None
            self._file.seek(part["p_offset"] + inside)
            result += self._file.read(count)
            address, length = address + count, length - count
        return result

    def notes(self, kind: str | int) -> list[Any]:
        """Return the notes of one kind."""
        segments: list[Any] = [s for s in self.elf.iter_segments() if s["p_type"] == "PT_NOTE"]
        return [note for one in segments for note in one.iter_notes() if note["n_type"] == kind]
