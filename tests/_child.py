"""Run code that may stall in a child process: the conformance suite's way, for every test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyuffd.conformance import _child
from pyuffd.conformance._child import (
    SCALE,
    STARTUP_S,
    ChildFailure,
    ChildResult,
    Expect,
    dotted,
    wait_for_end,
)
from pyuffd.conformance._need import Lack
from tests._need import skip

__all__ = [
    "ROOT",
    "SCALE",
    "STARTUP_S",
    "ChildFailure",
    "ChildResult",
    "Expect",
    "dotted",
    "run_child",
    "wait_for_end",
]

ROOT = Path(__file__).resolve().parent.parent


def run_child(
    target: Callable[..., Any] | str,
    /,
    *args: Any,
    budget_s: float = 10.0,
    expect: Expect = 0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> ChildResult:
    """Run a function or source text in a fresh Python process with a time limit.

    Args:
        target: a module-level function, its name as `package.module:function`, or source text.
        *args: positional arguments of the function; JSON carries them, so tuples arrive as lists.
        budget_s: seconds the code may take; scaled by PYUFFD_BUDGET_SCALE.
        expect: the return code that is right (negative for a signal), "timeout", or None for any.
        env: environment variables to add.
        **kwargs: keyword arguments of the function, through JSON.

    Returns:
        How the child ended. A skip raised in the child is raised again here.

    Raises:
        ChildFailure: the child ended differently from `expect`.
    """
    try:
        return _child.run_child(
            target, *args, budget_s=budget_s, expect=expect, env=env, paths=[str(ROOT)], **kwargs
        )
    except Lack as lack:
        skip(lack)
