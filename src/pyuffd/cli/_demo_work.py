"""Code of the demo's two processes: the working set, its edits and their messages (layer L6)."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyuffd
from pyuffd import Feature, Userfaultfd

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
PAGE = 4096

# The last bytes of the memory count the edits, so an image says itself which edits it contains.
COUNTER = struct.Struct("<Q")
# An edit changes one to three pages.
MAX_EDIT = 2 * PAGE

NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages"}

MESSAGE_LIMIT = 64 << 10
# Far longer than the other process needs between two messages.
REPLY_TIMEOUT_S = 60.0


class DemoError(pyuffd.UffdError):
    """The demo cannot continue; the text is for the user."""


@dataclass(frozen=True)
class WorkingSet:
    """The content of real files, one after the other."""

    origin: Path
    content: bytes
    files: int
    unreadable: int

    @property
    def length(self) -> int:
        """Bytes of memory that hold the content and the counter, in whole huge pages."""
        return -(-(len(self.content) + COUNTER.size) // HUGE_PAGE) * HUGE_PAGE


def collect(path: Path | None, limit: int) -> WorkingSet:
    """Read files until their content fills `limit` bytes of memory.

    Args:
        path: A file or a directory; None is the running Python's standard library.
        limit: Bytes, a multiple of the huge page size.

    Raises:
        OSError: the path does not exist or cannot be read.
        DemoError: it is neither a file nor a directory, or has no content.
    """
    origin = path or Path(sysconfig.get_path("stdlib"))
    kind = origin.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise DemoError(f"{origin} is neither a regular file nor a directory")
    names = [origin] if stat.S_ISREG(kind) else _files_below(origin, library=path is None)
    room = limit - COUNTER.size
    content = bytearray()
    files = unreadable = 0
    for name in names:
        if len(content) == room:
            break
        try:
            data = _read(name, room - len(content))
        except OSError:
            if name == origin:
                raise
            unreadable += 1
            continue
        content += data
        files += bool(data)
    if not content:
        raise DemoError(f"{origin} has no content that can be read")
    return WorkingSet(origin, bytes(content), files, unreadable)


def _files_below(directory: Path, *, library: bool) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        if error.filename == os.fspath(directory):
            raise error

    for folder, subfolders, names in os.walk(directory, onerror=fail):
        subfolders.sort()
        if library:
            subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        for name in sorted(names):
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def _read(path: Path, room: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        # Files in /proc and /sys report no size, and some never end.
        wanted = min(os.fstat(file.fileno()).st_size, room)
        data = bytearray()
        while len(data) < wanted and (piece := file.read(wanted - len(data))):
            data += piece
        return bytes(data)


def edit_forever(memory: memoryview | bytearray, content: bytes, seed: int) -> Iterator[int]:
    """Make edit after edit, and yield their number after each.

    An edit copies a slice of the content to another place in the memory. Source and target depend
    only on the seed and the edit's number.
    """
    rng = random.Random(seed).random
    source = memoryview(content)
    last = len(memory) - COUNTER.size
    longest = min(MAX_EDIT, len(content))
    made = 0
    while True:
        size = 1 + int(rng() * longest)
        at = int(rng() * (len(source) - size + 1))
        to = int(rng() * (last - size + 1))
        memory[to : to + size] = source[at : at + size]
        made += 1
        COUNTER.pack_into(memory, last, made)
        yield made


def replay(content: bytes, length: int, seed: int, edits: int) -> bytearray:
    """Return what the memory held after that many edits."""
    memory = bytearray(length)
    memory[: len(content)] = content
    made = 0
    edit = edit_forever(memory, content, seed)
    while made < edits:
        made = next(edit)
    return memory


def open_userfaultfd(features: Feature = Feature(0)) -> tuple[Userfaultfd, str]:  # noqa: B008
    """Open a userfaultfd as this user is allowed to; return it and why it is limited, or ""."""
    try:
        return Userfaultfd(features=features), ""
    except pyuffd.UffdPermissionError as error:
        return Userfaultfd(features=features, user_mode_only=True), error.hint


def send(to: socket.socket, message: dict[str, object], fds: list[int] | None = None) -> None:
    """Send one message, with descriptors."""
    socket.send_fds(to, [json.dumps(message).encode()], fds or [])


def receive(channel: socket.socket, max_fds: int = 0) -> tuple[dict[str, object], list[int]]:
    """Return the next message and its descriptors; EOFError when the other end is closed."""
    raw, fds, _, _ = socket.recv_fds(channel, MESSAGE_LIMIT, max_fds)
    if not raw:
        raise EOFError
    return json.loads(raw), fds
