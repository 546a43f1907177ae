"""Progress of a command: a bar by rich on a terminal, plain lines otherwise (layer L6)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from pyuffd import SnapshotProgress
from pyuffd.cli._signals import come_too_late

MIB = float(1 << 20)
LINE_EVERY_S = 1.0
TEXTS = {
    "before": "copying while it runs",
    "stop": "copying while stopped",
    "sweep": "copying while it runs",
    "sums": "checksums",
    "verify": "checking",
    "flatten": "writing",
}


class ProgressLines:
    """A line a second on stderr."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_EVERY_S

    def __call__(self, progress: SnapshotProgress) -> None:
        """Show it."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY_S
            text = TEXTS.get(progress.phase, progress.phase)
            print(
                f"{text}: {progress.bytes / MIB:.0f} of {progress.total / MIB:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class ProgressBar:
    """A bar for each phase on stderr, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description:>24}"), BarColumn(), DownloadColumn(True), Speed())
        self._bars: Any = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}

    def __call__(self, progress: SnapshotProgress) -> None:
        """Draw it."""
        text = TEXTS.get(progress.phase, progress.phase)
        if text not in self._tasks:
            self._tasks[text] = self._bars.add_task(text)
        self._bars.update(self._tasks[text], completed=progress.bytes, total=max(progress.total, 1))

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()


def progress_shown(*, quiet: bool) -> ProgressBar | ProgressLines | Quiet:
    """Return the kind of progress display that suits stderr."""
    if quiet:
        return Quiet()
    if sys.stderr is not None and sys.stderr.isatty():
        with suppress(ImportError):
            return ProgressBar()
    return ProgressLines()


def until_named(
    shown: Callable[[SnapshotProgress], None],
) -> Callable[[SnapshotProgress], None]:
    """Wrap `shown`: in phase "name" the result becomes complete, and no signal ends the command."""

    def tell(progress: SnapshotProgress) -> None:
        if progress.phase == "name":
            come_too_late()
        else:
            shown(progress)

    return tell


class Quiet:
    """Shows nothing."""

    def __call__(self, progress: SnapshotProgress) -> None:
        """Show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
