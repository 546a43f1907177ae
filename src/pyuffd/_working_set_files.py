"""The file of a working set: reading one that cannot be trusted, adding a recording (layer L4)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress

from pyuffd._owned import Descriptor
from pyuffd._working_set import HEAD, MOST_ROWS, ROW, Run, WorkingSet, merged, pack, unpack

_LONGEST = HEAD.size + MOST_ROWS * ROW.size
# Merging the largest sets takes seconds.
_LOCK_S = 20.0
_LOCK_LOOK_S = 0.02


def load(path: str, image_id: bytes, image_length: int) -> WorkingSet | None:
    """Return the set in a file, with a `problem` if it cannot be used; None if there is no file."""

    def not_used(problem: str) -> WorkingSet:
        return WorkingSet(image_id, image_length, problem=problem)

    try:
        # A FIFO would wait for its writer.
        file = Descriptor.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return not_used("a symbolic link")
        return not_used(f"it cannot be opened: {error.strerror}")
    with file:
        found = os.fstat(file.number)
        if not stat.S_ISREG(found.st_mode):
            return not_used("not a regular file")
        if found.st_size > _LONGEST:
            return not_used(f"{found.st_size} bytes are too many")
        try:
            raw = _read(file.number, found.st_size + 1)
        except OSError as error:
            return not_used(f"it cannot be read: {error.strerror}")
    return unpack(raw, image_id, image_length)


def _read(descriptor: int, most: int) -> bytes:
    parts = []
    while most and (data := os.read(descriptor, most)):
        parts.append(data)
        most -= len(data)
    return b"".join(parts)


def add(
    path: str,
    image_id: bytes,
    image_length: int,
    recorded: Iterable[Run],
    filled: Iterable[Run] = (),
) -> WorkingSet:
    """Add a recording to a file, in one step, and return the set that it has now.

    A file that cannot be used is replaced. Recordings that end at once are added one after the
    other.

    Raises:
        OSError: the file cannot be written, or somebody else does not end writing it.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    with _locked(temporary) as file:
        try:
            known = load(path, image_id, image_length)
            if known is None:
                known = WorkingSet(image_id, image_length)
            known = merged(known, recorded, filled)
            os.ftruncate(file.number, 0)
            view = memoryview(pack(known))
            while view:
                view = view[os.write(file.number, view) :]
            os.fsync(file.number)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    return known


def _locked(path: str) -> Descriptor:
    """Return the temporary file, which one process at a time has; one that was killed leaves it."""
    until = time.monotonic() + _LOCK_S
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            file = Descriptor.open(path, flags, 0o600)
        except OSError as error:
            # A symbolic link, or a FIFO: nothing of ours.
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            os.unlink(path)
            continue
        try:
            found = os.fstat(file.number)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            elif _is_ours(file.number, path):
                return file
            elif time.monotonic() >= until:
                raise BlockingIOError(
                    errno.EAGAIN, f"another process has locked it for {_LOCK_S:g} s", path
                )
            else:
                time.sleep(_LOCK_LOOK_S)
        except BaseException:
            file.close()
            raise
        file.close()


def _is_ours(descriptor: int, path: str) -> bool:
    """Lock it; False if another has it, or had it and gave the file its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
