"""What is in the files of a snapshot: the base of `Snapshot`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

from pyuffd._arguments import check_int, check_path, shown
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError
from pyuffd.snapshot import _verify, _working_sets
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._content import chain_of
from pyuffd.snapshot._format import RunState, SnapshotGap, SnapshotRegion, SnapshotRun
from pyuffd.snapshot._reading import Image


class Opened(Closing):
    """A snapshot and its parents, opened for reading; see `Snapshot`."""

    _what = "snapshot"
    _instead = "open it once more"

    def __init__(self, image: Image) -> None:
        if not isinstance(image, Image):
            raise TypeError(
                f"{type(self).__name__} is made by {type(self).__name__}.open(path) and .take(...),"
                f" not of {shown(image)}"
            )
        self._image = image
        self.path: str = image.path
        self.id: str = str(image.manifest["id"])
        self.manifest: dict[str, Any] = image.manifest
        self._maker = os.getpid()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a snapshot and its parents for reading.

        Parents are found by the hash of their manifest, at the place that was noted or beside the
        snapshot, whatever their names are by now.

        Raises:
            SnapshotFormatError: the directory is no snapshot; files are missing, truncated or
                changed, or a parent is not found.
            OSError: the directory cannot be opened, or is a symbolic link.
        """
        return cls(Image(check_path("path", path)))

    @property
    def depth(self) -> int:
        """How many parents it has, one behind the other."""
        return len(chain_of(self._checked())) - 1

    @property
    def directories(self) -> Sequence[str]:
        """Where it and its parents are, the newest first."""
        return tuple(image.path for image in chain_of(self._checked()))

    @property
    def regions(self) -> Sequence[SnapshotRegion]:
        """The mappings of the process at the instant, in ascending order."""
        return tuple(self._checked().regions)

    @property
    def runs(self) -> Sequence[SnapshotRun]:
        """The table of runs: what this snapshot, without its parents, knows of every page."""
        return self._checked().runs

    @property
    def gaps(self) -> Sequence[SnapshotGap]:
        """Where it does not have the content of the instant, and why."""
        return tuple(SnapshotGap(**each) for each in self._checked().manifest["gaps"])

    def state(self, address: int) -> RunState | None:
        """Return what is known of a page; None if it was not mapped. PARENT is looked up there."""
        check_int("address", address, 0)
        part = next(self._checked().parts(address, address + 1))
        return None if part.run is None else part.run.state

    def read(self, address: int, length: int) -> bytes:
        """Return memory as it was at the instant.

        A chunk of the file, of up to 1 MiB, is read and compared with its checksum when it is first
        touched; from then on only the bytes that are asked for are read.

        `numpy.frombuffer(snapshot.read(address, 8 * n), "<u8")` is an array of it.

        Args:
            address: Any address.
            length: Bytes; any number.

        Raises:
            LookupError: a part of it was not mapped, or the snapshot does not have it: its state is
                LOST or SHARED, or ABSENT in a mapping of a file, where the file has it.
            SnapshotFormatError: a chunk of the file was changed.
        """
        check_int("address", address, 0)
        check_int("length", length, 0)
        return self._checked().read(address, length)

    def verify(self, progress: Callable[[SnapshotProgress], None] | None = None) -> None:
        """Read everything, in the parents too, and compare it with the checksums.

        Raises:
            SnapshotFormatError: chunks were changed; `offset` is that of the first, and the message
                tells how many there are.
        """
        _verify.verify(self._checked(), progress)

    def image_offset(self, address: int) -> int:
        """Return where an address is in the image, as `WorkingSetRun.offset` counts.

        The image is `regions`, one behind the other.

        Raises:
            LookupError: it was not mapped.
        """
        check_int("address", address, 0)
        return _working_sets.offset_of(self._checked(), address)

    # Ending

    def _check_usable(self) -> None:
        self._checked()

    def _checked(self) -> Image:
        if self._image.closed:
            raise ClosedError("this snapshot is closed")
        return self._image

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._image.closed

    def close(self) -> None:
        """Close the files."""
        self._image.close()

    def __del__(self) -> None:
        if hasattr(self, "_maker") and not self.closed and self._maker == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        target = self.manifest["target"]
        state = " closed" if self.closed else ""
        return f"<Snapshot {self.path} of process {target['pid']} ({target['name']}){state}>"
