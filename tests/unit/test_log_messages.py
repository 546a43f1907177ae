"""Logging's last resort prints only the message, which must name pyuffd."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "pyuffd"
# It logs only if logging is configured, and writes to stderr itself.
SAYS_ITSELF = {"handlers/_failures.py", "_closing.py"}
NOT_THE_LIBRARY = {"cli", "testing", "conformance"}


def messages() -> Iterator[tuple[str, int, str]]:
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE)
        if name.parts[0] in NOT_THE_LIBRARY or str(name) in SAYS_ITSELF:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr="warning" | "error"),
                    args=[ast.Constant(value=str(text)), *_],
                ):
                    yield str(name), node.lineno, text


def test_say_who_speaks() -> None:
    found = list(messages())
    assert len(found) > 5
    assert [one for one in found if not one[2].startswith("pyuffd: ")] == []
