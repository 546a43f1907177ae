"""The live table of `pyuffd track`, by rich (layer L6)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from pyuffd.cli._written import Sample

MIB = float(1 << 20)


class Table:
    """A table that is redrawn each round."""

    def __init__(self, top: int, pid: int) -> None:
        self._top = top
        self._pid = pid
        self._live = Live(Text("waiting for the first round"), auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(exc_type, exc, traceback)

    def show(self, sample: Sample, number: int) -> None:
        """Draw a round."""
        dirty = "   ".join(
            f"{window} s: {size / MIB:.1f} MiB" for window, size in sample.dirty_bytes.items()
        )
        head = Text(
            f"process {self._pid}   {sample.seconds:.0f} s   {sample.rate / MIB:.2f} MiB/s written"
            f"   dirty in the last {dirty}"
        )
        table = RichTable(box=None, pad_edge=False)
        table.add_column("mapping")
        table.add_column("at", style="dim")
        table.add_column("size MiB", justify="right")
        table.add_column("written MiB", justify="right")
        table.add_column("dirty MiB", justify="right")
        for part in sample.parts[: self._top]:
            table.add_row(
                Text(part.name),  # not markup: a process gives its mappings any names
                f"{part.start:x}",
                f"{(part.end - part.start) / MIB:.2f}",
                f"{part.written_bytes / MIB:.2f}",
                f"{part.dirty_bytes / MIB:.2f}",
            )
        self._live.update(Group(head, table), refresh=True)
