"""The tables and programs of README.md and docs/*.md, for the tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def table(name: str) -> dict[str, dict[str, str]]:
    """Return the cells of README's table after `<!-- table: name -->`, by row and column."""
    found = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", README.read_text())
    if not found:
        raise LookupError(f"README.md has no table {name!r}")
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in found[1].splitlines()
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def programs(page: Path) -> list[str]:
    """Return the Python programs of a page, without consoles and shell lines."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
