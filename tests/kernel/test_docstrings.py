"""The examples in docstrings run, in one child for each module, since they may stall."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import pyuffd
from tests._child import run_child

PACKAGE = Path(pyuffd.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]
# Newcomers begin with these; their docstrings show how.
SHOWN = ["Userfaultfd", "Region", "Handler", "BufferSource", "Pagemap", "probe"]


def run(name: str) -> list[int]:
    """Run the examples of a module; return how many failed, and how many there are."""
    result = doctest.testmod(importlib.import_module(name))
    return [result.failed, result.attempted]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name: str) -> None:
    result = run_child(run, name)
    failed, attempted = result.value
    assert failed == 0, result.stdout
    assert attempted > 0


@pytest.mark.parametrize("name", SHOWN)
def test_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(getattr(pyuffd, name).__doc__)


def test_every_public_name_is_documented() -> None:
    lacking = [
        name
        for name in pyuffd.__all__
        if hasattr(value := getattr(pyuffd, name), "__module__") and not value.__doc__
    ]
    assert lacking == []
