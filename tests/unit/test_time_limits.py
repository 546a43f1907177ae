"""A busy machine is no hang: time limits of programs that tests start scale with its load."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests._child import ROOT

STARTS_OR_WAITS = {"run", "check_call", "check_output", "communicate"}
SCALED = {"limit_s", "crowd"}
OTHERS = {"vm"}  # what starts kernels has limits of its own


def fixed_limits() -> Iterator[str]:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = path.relative_to(ROOT / "tests")
        if name.parts[0] in OTHERS:
            continue
        text = path.read_text()
        if "timeout=" not in text:
            continue
        tree = ast.parse(text)
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=called), keywords=keywords):
                    if called not in STARTS_OR_WAITS:
                        continue
                    for keyword in keywords:
                        if keyword.arg == "timeout" and is_fixed(keyword.value, constants):
                            yield f"{name}:{node.lineno}"


def is_fixed(limit: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """Return whether the limit is a number of this file, which nothing scales."""
    names = {node.id for node in ast.walk(limit) if isinstance(node, ast.Name)}
    if names & SCALED:
        return False
    return all(
        is_fixed(constants[name], constants) if name in constants else False for name in names
    )


def test_programs_may_be_slow_on_a_busy_machine() -> None:
    assert list(fixed_limits()) == []
