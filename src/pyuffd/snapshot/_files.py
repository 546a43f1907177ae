"""A new directory that appears complete or not at all, and reading one without following links."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pyuffd import _image_calls as calls
from pyuffd._owned import Descriptor
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._format import PAGES
from pyuffd.snapshot._output import name_is_taken, named, sync, write_at

# What mkdir(2) says about the folder that it would be in.
_OF_PARENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def check_absent(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if something has this name, a link too."""
    if os.path.lexists(path):
        raise name_is_taken(str(path))


class NewDirectory:
    """Files that are written under a temporary name, and appear under their own at the end.

    Entering removes what snapshots with this name left that were killed. Leaving without `settle`
    removes the files.
    """

    def __init__(self, path: str | os.PathLike[str], *, durable: bool) -> None:
        self.path = Path(os.path.abspath(path))
        if not self.path.name:
            raise ValueError(f"path {str(self.path)!r} does not end with the name of a directory")
        self.id = uuid.uuid4().hex
        self._durable = durable
        self._temporary = self.path.with_name(f".{self.path.name}.{self.id[:8]}.tmp")
        self.pages = Descriptor()
        check_absent(self.path)

    def __enter__(self) -> NewDirectory:
        try:
            self.make()
        except BaseException:
            self._remove()
            raise
        return self

    def make(self) -> None:
        """Make it; `__exit__` ends it from here on, also if this raises."""
        for stale in self._stale():
            shutil.rmtree(stale, ignore_errors=True)
        try:
            os.mkdir(self._temporary, 0o700)
        except OSError as error:
            path = self.path.parent if error.errno in _OF_PARENT else self.path
            raise OSError(error.errno, error.strerror, str(path)) from None
        self.pages = self._create(PAGES)
        # A process that finds it locked knows that it is not stale.
        fcntl.flock(self.pages.number, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        self.pages.close()
        self._remove()

    def _stale(self) -> Iterator[Path]:
        for other in self.path.parent.glob(f".{self.path.name}.????????.tmp"):
            with suppress(OSError), _opened(other / PAGES, os.O_RDWR) as pages:
                fcntl.flock(pages.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield other
                continue
            # One that was killed before it had a file; one that has some stays.
            with suppress(OSError):
                os.rmdir(other)

    def _create(self, name: str) -> Descriptor:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            return Descriptor.open(self._temporary / name, flags, 0o600)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file."""
        with self._create(name) as file, self.named(name):
            write_at(file.number, content, 0)
            if self._durable:
                sync(file.number)

    def named(self, name: str) -> AbstractContextManager[None]:
        """Put the name that a file would have got into errors of writing it."""
        return named(str(self.path / name), self.pages.number)

    def replace_pages(self) -> Descriptor:
        """Begin a second file that takes the place of `pages` in `settle`."""
        return self._create(PAGES + ".new")

    def pages_replaced(self, file: Descriptor) -> None:
        """It is complete."""
        os.rename(self._temporary / (PAGES + ".new"), self._temporary / PAGES)
        fcntl.flock(file.number, fcntl.LOCK_EX)
        self.pages.close()
        self.pages = file

    def begin_sync(self) -> None:
        """Let the disk begin with the pages, if somebody will wait for it."""
        if self._durable:
            calls.begin_sync(self.pages.number)

    def sync_pages(self) -> None:
        """Wait until the pages are on the disk, unless that was not asked for."""
        if self._durable:
            with self.named(PAGES):
                sync(self.pages.number)

    def settle(self, progress: Callable[[SnapshotProgress], None] | None) -> None:
        """Give the directory its name, if nobody else has taken it meanwhile.

        Args:
            progress: Told right before.
        """
        if self._durable:
            self._sync_directory(self._temporary)
        if progress is not None:
            progress(SnapshotProgress("name"))
        _rename_new(self._temporary, self.path)
        if self._durable:
            self._sync_directory(self.path.parent)

    def _sync_directory(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY
        with Descriptor.open(path, flags) as folder, named(str(self.path), folder.number):
            sync(folder.number)

    def _remove(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a directory; rename(2) replaces nothing but an empty directory."""
    if os.path.lexists(target):
        raise name_is_taken(str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise name_is_taken(str(target)) from None
        raise OSError(error.errno, error.strerror, str(target)) from None


def _opened(path: Path, flags: int) -> Descriptor:
    return Descriptor.open(path, flags | os.O_NOFOLLOW)


def open_directory(path: str | os.PathLike[str]) -> Descriptor:
    """Open a snapshot's directory; a symbolic link is refused (ENOTDIR or ELOOP)."""
    return Descriptor.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def open_in(folder: Descriptor, name: str) -> Descriptor:
    """Open a file of a directory for reading.

    Raises:
        OSError: ELOOP - a symbolic link; EINVAL - a FIFO, a device or a directory.
    """
    # A FIFO would wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    file = Descriptor.open(f"/proc/self/fd/{folder.number}/{name}", flags)
    if not stat.S_ISREG(os.fstat(file.number).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", name)
    return file
