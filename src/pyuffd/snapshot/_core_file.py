"""A new file that has no name until it is complete, and never replaces another."""

from __future__ import annotations

import errno
import os
import secrets
from typing import TYPE_CHECKING

from pyuffd._closing import Closing
from pyuffd._machine import raise_without_procfs
from pyuffd._owned import Descriptor, FileName
from pyuffd.snapshot import _core_elf
from pyuffd.snapshot._output import name_is_taken, named, sync, write_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pyuffd.snapshot._core_elf import Segment

_MODE = 0o600  # a core holds secrets
# What file systems without O_TMPFILE say; EISDIR and ENOENT come from kernels without it.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
# What link(2) says where there are no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class NewFile(Closing):
    """A file without a name, in the folder where it will get one.

    Where the file system supports it, the file has no name at all until `publish` (O_TMPFILE), so
    nothing remains of it, however this process ends. Elsewhere it has a hidden name of its own
    until then, which `close` removes.

    Args:
        path: The name that it will get. A link at that place is not followed, and is in the way as
            any other file is.

    Raises:
        ValueError: a path without a name at its end.
        FileExistsError: EEXIST - there is something with this name.
        OSError: the folder does not exist, or cannot be written.
    """

    _failed = "removing the unfinished file failed"
    _instead = "make another file"

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        folder, self._name = os.path.split(self.path)
        if self._name in ("", ".", ".."):
            raise ValueError(f"path {self.path!r} does not end with the name of a file")
        self._folder = Descriptor.open(folder or ".", os.O_PATH | os.O_DIRECTORY)
        self._hidden = FileName()
        self._refuse_existing()
        try:
            self._file = _unnamed(self._folder.number)
            if self._file is None:
                self._file = self._hidden_file()
        except OSError as error:
            raise_without_procfs(f"make a file in {folder or '.'}", error)
            raise OSError(error.errno, error.strerror, folder or ".") from None
        os.fchmod(self._file.number, _MODE)  # whatever the umask says

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's."""
        assert self._file is not None
        return self._file.number

    def named(self) -> AbstractContextManager[None]:
        """Put its name into errors of writing it."""
        return named(self.path, self.fileno())

    def publish(self, *, durable: bool, before: Callable[[], None] | None = None) -> None:
        """Give it its name, if nothing else has the name by now.

        Args:
            durable: Wait until the content and the name are on the disk.
            before: Called right before it gets the name.
        """
        here = self._folder.number
        if durable:
            with self.named():
                sync(self.fileno())
        if before is not None:
            before()
        try:
            if self._hidden_name:
                self._rename(here)
            else:
                os.link(
                    f"/proc/self/fd/{self.fileno()}",
                    self._name,
                    src_dir_fd=here,
                    dst_dir_fd=here,
                    follow_symlinks=True,
                )
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None
        if durable:
            path, flags = f"/proc/self/fd/{here}", os.O_RDONLY | os.O_DIRECTORY
            with Descriptor.open(path, flags) as folder, self.named():
                sync(folder.number)

    def close(self) -> None:
        """Close it; without `publish` nothing is left of it."""
        self._hidden.close()
        if self._file is not None:
            self._file.close()
        self._folder.close()

    _hidden_name = ""

    def _refuse_existing(self) -> None:
        try:
            os.lstat(self._name, dir_fd=self._folder.number)
        except FileNotFoundError:
            return
        raise name_is_taken(self.path)

    def _hidden_file(self) -> Descriptor:
        self._hidden_name = f".{self._name[:200]}.{secrets.token_hex(8)}"
        path = f"/proc/self/fd/{self._folder.number}/{self._hidden_name}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return Descriptor.create(path, flags, _MODE, self._hidden)

    def _rename(self, here: int) -> None:
        try:  # a second name, which fails if it exists
            os.link(self._hidden_name, self._name, src_dir_fd=here, dst_dir_fd=here)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system such as FAT, where nothing but rename(2) gives a name.
            self._refuse_existing()
            os.rename(self._hidden_name, self._name, src_dir_fd=here, dst_dir_fd=here)
        else:
            os.unlink(self._hidden_name, dir_fd=here)


def _unnamed(folder: int) -> Descriptor | None:
    try:
        return Descriptor.open(f"/proc/self/fd/{folder}", os.O_TMPFILE | os.O_RDWR, _MODE)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return None
        raise


def write_ends(fd: int, end: int, segments: Sequence[Segment], notes: bytes) -> int:
    """Write notes and headers behind the memory, and the ELF header last; return the length."""
    phdrs_at = end + len(notes) + -len(notes) % 8
    headers = _core_elf.program_headers(end, len(notes), segments)
    count = len(segments) + 1
    tail = notes.ljust(phdrs_at - end, b"\0") + headers + _core_elf.section_header(count)
    write_at(fd, tail, end)
    write_at(fd, _core_elf.elf_header(phdrs_at, count, phdrs_at + len(headers)), 0)
    return end + len(tail)
