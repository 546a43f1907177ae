"""The demo's last part: snapshots and a core of an unprepared program (layer L6)."""

from __future__ import annotations

import contextlib
import hashlib
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import pyuffd
from pyuffd import DirtyTracker, Process, Region, Snapshot, SnapshotReport, write_core
from pyuffd.cli._demo_work import PAGE, DemoError

# The program, which knows nothing of pyuffd. Edit n writes the number n into the next page of the
# edited part; the rest does not change.
PROGRAM = """
import ctypes, sys, threading
data = bytearray(open(sys.argv[1], "rb").read())
pages = max(1, len(data) // 4096 // 8)
edits = 0
def edit():
    global edits
    while True:
        number = edits + 1
        at = number * 7919 % pages * 4096
        data[at : at + 8] = number.to_bytes(8, "little")
        edits = number
threading.Thread(target=edit, daemon=True).start()
print(ctypes.addressof(ctypes.c_char.from_buffer(data)), flush=True)
for line in sys.stdin:
    print(edits, flush=True)
"""
STRIDE = 7919
EDITED_PART = 8
NUMBER = struct.Struct("<Q")
LONGEST_STALL_S = 2.0
# On a busy machine a thread may get no CPU to stop on.
ATTEMPTS = 5
EDITS_BEFORE = 20_000
WAIT_S = 0.5

_ELF = struct.Struct("<32xQQ6xHH6x")
_LOAD = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1

_T = TypeVar("_T")
_Method = Literal["precopy", "stopped"]


@dataclass(frozen=True)
class Check:
    """Memory that was read back.

    Attributes:
        edit: The number of edits that it contains.
        verified: Whether it is exactly the files with the first `edit` edits.
    """

    edit: int
    verified: bool


@dataclass(frozen=True)
class Image:
    """A snapshot or a core of the program, and the check of its content."""

    what: str
    method: str
    bytes: int
    pause_s: float
    seconds: float
    check: Check


@dataclass(frozen=True)
class Result:
    """The images that were taken of the program.

    Attributes:
        pid: The program.
        length: Bytes of its data.
        images: The images, in the order in which they were taken.
        edits: How many edits it made from the first image to the last.
        goes_on: Whether it continues to work afterwards, untraced.
        why: Why it had to be stopped for the whole copy, or "".
    """

    pid: int
    length: int
    images: tuple[Image, ...]
    edits: int
    goes_on: bool
    why: str

    @property
    def verified(self) -> bool:
        """Whether everything that was read back is right."""
        return self.goes_on and all(image.check.verified for image in self.images)


class NotAllowedError(pyuffd.UffdError):
    """This user may not trace another process; the text says why."""


class _Program:
    def __init__(self, folder: Path, content: bytes) -> None:
        (folder / "data").write_bytes(content)
        self._popen = subprocess.Popen(
            [sys.executable, "-S", "-c", PROGRAM, str(folder / "data")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the parent; the program ends with its standard input
        )
        self.pid = self._popen.pid
        self.start = self._number()
        self.length = len(content)

    def _number(self) -> int:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise DemoError(f"the program ended with exit status {self._popen.wait()}")
        return int(line)

    def edits(self) -> int:
        """Ask how many edits it has made."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write("\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            raise DemoError(f"the program ended with exit status {self._popen.wait()}") from None
        return self._number()

    def wait_for(self, edits: int) -> None:
        """Let it work for a while."""
        until = time.monotonic() + WAIT_S
        while self.edits() < edits and time.monotonic() < until:
            time.sleep(0.01)

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()


def edited_pages(content: bytes) -> int:
    """Return how many pages the program edits."""
    return max(1, len(content) // PAGE // EDITED_PART)


def replay(content: bytes, edits: int) -> bytearray:
    """Repeat the first edits on the files' content."""
    memory = bytearray(content)
    pages = edited_pages(content)
    # Later edits replace earlier ones in the same page.
    for number in range(max(1, edits - pages + 1), edits + 1):
        NUMBER.pack_into(memory, number * STRIDE % pages * PAGE, number)
    return memory


def check(content: bytes, found: bytes | bytearray) -> Check:
    """Compare memory with the files after all edits up to the last one found in it."""
    pages = edited_pages(content)
    edit = 0
    for page in range(pages):
        number = NUMBER.unpack_from(found, page * PAGE)[0]
        # In a page that was never edited there is text, which reads as a number that is too large
        # or belongs to another page.
        if number * STRIDE % pages == page and number < 1 << 40:
            edit = max(edit, number)
    same = hashlib.sha256(found).digest() == hashlib.sha256(replay(content, edit)).digest()
    return Check(edit, same)


def look_at(content: bytes, folder: Path) -> Result:
    """Start the program, take two snapshots and a core of it while it works, and read them back.

    Raises:
        NotAllowedError: this user may not trace another process.
        DemoError: the program ended.
    """
    with contextlib.ExitStack() as stack:
        program = _Program(folder, content[: len(content) // PAGE * PAGE])
        stack.callback(program.close)
        content = content[: program.length]
        try:
            process = stack.enter_context(Process(program.pid))
            with process.stopped(LONGEST_STALL_S):
                pass
        except PermissionError as error:
            raise NotAllowedError(str(error)) from None
        program.wait_for(EDITS_BEFORE)
        before = program.edits()
        method: _Method = "precopy"
        why = ""
        tracker: DirtyTracker | None = None
        try:
            tracker = stack.enter_context(DirtyTracker(process, method="wp-async"))
        except pyuffd.UffdOSError as error:
            method, why = "stopped", str(error)
        images = tuple(_images(program, process, tracker, content, folder, method))
        edits = program.edits() - before
        program.wait_for(program.edits() + 1)
        goes_on = program.edits() > before + edits and not _tracer(program.pid)
        return Result(program.pid, program.length, images, edits, goes_on, why)


def _images(
    program: _Program,
    process: Process,
    tracker: DirtyTracker | None,
    content: bytes,
    folder: Path,
    method: _Method,
) -> Iterator[Image]:
    first, second, core = folder / "first", folder / "second", folder / "core"

    def take(path: Path, parent: Path | None) -> SnapshotReport:
        return Snapshot.take(
            process,
            path,
            method=method,
            parent=parent,
            tracker=tracker,
            max_stall_s=LONGEST_STALL_S,
            durable=False,
        )

    for what, path, parent in (("full", first, None), ("incremental", second, first)):
        report = _retried(lambda path=path, parent=parent: take(path, parent))  # type: ignore[misc]
        with Snapshot.open(path) as snapshot:
            snapshot.verify()
            found = _restored(snapshot, program.start, program.length)
        yield Image(
            what,
            report.method,
            report.bytes,
            report.pause_s,
            report.seconds,
            check(content, found),
        )
    if tracker is not None:
        tracker.close()  # write_core makes its own
    done = _retried(lambda: write_core(process, core, method=method, max_stall_s=LONGEST_STALL_S))
    yield Image(
        "core",
        done.method,
        done.bytes,
        done.pause_s,
        done.seconds,
        check(content, read_core(core, program.start, program.length)),
    )


def _retried(call: Callable[[], _T]) -> _T:
    for _ in range(ATTEMPTS - 1):
        try:
            return call()
        except pyuffd.StopTimeoutError:
            pass
        except pyuffd.SnapshotError as error:
            if error.reason != "stalled":
                raise
    return call()


def _restored(snapshot: Snapshot, start: int, length: int) -> bytes:
    """Restore memory lazily into new memory of this process, and read it there."""
    first = start // PAGE * PAGE
    last = -(-(start + length) // PAGE) * PAGE
    with Region.anonymous(last - first) as region:
        try:
            restore = snapshot.restore([(first, region)], mode="copy")
        except PermissionError:
            return snapshot.read(start, length)
        with restore:
            return bytes(region.read(start - first, length))


def read_core(path: Path, start: int, length: int) -> bytes:
    """Read memory from an ELF core, located by its program headers."""
    with open(path, "rb") as file:
        headers_at, _, size, count = _ELF.unpack(file.read(_ELF.size))
        file.seek(headers_at)
        table = file.read(size * count)
        for at in range(0, len(table), size):
            kind, _, offset, address, _, in_file, _, _ = _LOAD.unpack_from(table, at)
            if kind == _PT_LOAD and address <= start and start + length <= address + in_file:
                file.seek(offset + start - address)
                return file.read(length)
    raise DemoError(f"the core has no memory at {start:#x}")


def _tracer(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid:"))


def run(content: bytes) -> Result:
    """Run `look_at` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="pyuffd-demo-") as folder:
        return look_at(content, Path(folder))
