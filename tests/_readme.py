"""The tables and programs of README.md and docs/, for the tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

# A program, after a comment with what it needs and how it ends, and before the lines it prints.
PROGRAM = re.compile(
    r"(?:^<!-- run: (?P<how>[^\n]*) -->\n)?"
    r"^```python\n(?P<source>.*?)^```$"
    r"(?:\n\n<!-- output -->\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Program:
    """A program of a page.

    Attributes:
        source: Its text.
        output: Some of the lines that it prints, in order; empty if the page shows none.
        needs: What the kernel and the user must have: names of features and capabilities.
        ends: How it ends: "" for status 0, "warning" for 0 after a warning, "error" for 1, the
            name of a signal, or "hangs".
        numbers_vary: Whether the numbers in its output differ from run to run.
        in_container: Whether it runs under a seccomp filter like those of containers.
    """

    source: str
    output: list[str]
    needs: list[str]
    ends: str
    numbers_vary: bool
    in_container: bool


def table(name: str) -> dict[str, dict[str, str]]:
    """Return the cells of the table after `<!-- table: name -->`, by row and column."""
    pattern = re.compile(rf"<!-- table: {name} -->\n((?:\|.*\n)+)")
    for page in PAGES:
        if found := pattern.search(page.read_text()):
            break
    else:
        raise LookupError(f"no page has a table {name!r}")
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in found[1].splitlines()
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def programs(page: Path) -> list[Program]:
    """Return the Python programs of a page, without console sessions and shell lines."""
    found = []
    for match in PROGRAM.finditer(page.read_text()):
        how = dict(word.split("=") for word in (match["how"] or "").split())
        found.append(
            Program(
                match["source"],
                (match["output"] or "").splitlines(),
                how["needs"].split(",") if "needs" in how else [],
                how.get("ends", ""),
                how.get("varies") == "numbers",
                how.get("in") == "container",
            )
        )
    return found
