"""What the background does for memory that is mapped: it compares the image with its checksums."""

from __future__ import annotations

from collections.abc import Sequence

from pyuffd._errors import SnapshotFormatError
from pyuffd.snapshot._content import Placed, Sums
from pyuffd.snapshot._drain import Drain

Piece = tuple[Placed, int, int, int]


class Comparing:
    """Compares all chunks that were mapped; the first that differs is the error of its drain.

    Attributes:
        drain: The threads that do it.
    """

    def __init__(
        self, placed: Sequence[Placed], *, threads: int, rate: float | None, paused: bool
    ) -> None:
        self._sums = Sums(placed[0].images)
        self._error: BaseException | None = None
        self._image = placed[0].images[0]
        self._image.hold(self)
        pieces = [(each, *piece) for each in placed for piece in each.pieces()]
        self.drain: Drain[Piece] = Drain(
            self._compare, self._finish, pieces, threads=threads, rate=rate, paused=paused
        )

    def _compare(self, piece: Piece) -> int:
        placed, offset, end, size = piece
        try:
            self._sums.check(placed.start + offset, placed.start + end)
        except (SnapshotFormatError, OSError) as error:
            self._error = self._error or error
        return size

    def _finish(self) -> None:
        self._image.let_go(self)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End it in the middle; may be called again."""
        self.drain.stop()
        self._image.let_go(self)
