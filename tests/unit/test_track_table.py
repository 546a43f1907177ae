"""The live table of `pyuffd track` shows names as they are."""

from __future__ import annotations

import array
import io

import pytest

from pyuffd import PageRanges
from pyuffd.cli._written import Part, Sample

rich_console = pytest.importorskip("rich.console")


@pytest.mark.parametrize(
    "name", ["[heap]", "[stack]", "memfd:a[/red]b", "/tmp/[bold]x", "a:smile:"]
)
def test_a_name_is_not_markup(name: str) -> None:
    """A process gives its mappings any names."""
    from pyuffd.cli._table import Table

    table = Table(5, 1)
    sample = Sample(
        1.0,
        0.0,
        4096,
        0,
        {1: 4096},
        [Part(0, 4096, name, 4096, 4096)],
        PageRanges(memoryview(array.array("Q"))),
    )
    table.show(sample, 1)
    out = io.StringIO()
    rich_console.Console(file=out, width=100).print(table._live.renderable)
    assert f"\n{name} " in out.getvalue()
