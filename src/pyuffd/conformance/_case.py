"""The table of all cases, and how a function becomes one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pyuffd.conformance._spec import NO_FEATURE, Features, Spec, Variant
from pyuffd.conformance._types import ALL, ANY
from pyuffd.testing._memory_types import MEMORY_TYPES
from pyuffd.testing._need import Need

if TYPE_CHECKING:
    from pyuffd.conformance._context import Context

# `<op>.<errno or ok>.<condition>`, `kselftest.<case>`, `wp-series.<patch>.<behaviour>`, ...
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
DEFAULT_BUDGET_S = 20.0  # a hundred times as long as a case runs on an idle machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(Spec):
    """One behaviour, on one or more memory types: the `Spec`, and the function that checks it.

    Attributes:
        run: The function.
    """

    run: Callable[[Context], None]


_cases: dict[str, Case] = {}


def case(
    name: str,
    *,
    origin: str,
    memory: Sequence[str] = ALL,
    features: Features = NO_FEATURE,
    needs: Iterable[Need] = (),
    variants: Iterable[Variant] = (),
    budget_s: float = DEFAULT_BUDGET_S,
    slow: bool = False,
    alone: bool = False,
    noisy: bool = False,
    crossing: bool = False,
    summary: str = "",
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Make a function of one `Context` a case; its docstring's first line is the summary.

    Args:
        name: The id without the memory type; must be new.
        origin: Where it comes from.
        memory: Names of memory types; see `_types`.
        features: What the kernel must have, or a function of the memory type that says so.
            `ctx.open()` enables exactly these.
        needs: Further needs, made by the functions of `_need`.
        variants: Accepted behaviours, for `ctx.expect_variant`.
        budget_s: Seconds after which it has stalled; scaled by PYUFFD_BUDGET_SCALE.
        slow: Skip it unless slow cases are requested.
        alone: Run no other case of this user at the same time, in any process.
        noisy: Do not report the kernel's warnings during it, except a WARN. Only for a case that
            runs alone, since all cases see the same log.
        crossing: It is one of a table of combinations.
        summary: For functions that several cases share.

    Raises:
        ValueError: a bad or duplicate name, or no summary.
    """

    def add(function: Callable[[Context], None]) -> Callable[[Context], None]:
        text = summary or (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        if not _NAME.fullmatch(name) or name in _cases:
            raise ValueError(f"case {name!r}: not an id, or already defined")
        if not text:
            raise ValueError(f"case {name!r} has no summary")
        if noisy and not alone:
            raise ValueError(f"case {name!r} is noisy, so it has to run alone")
        if unknown := set(memory) - {*MEMORY_TYPES, *ANY}:
            raise ValueError(f"case {name!r}: unknown memory types {sorted(unknown)}")
        _cases[name] = Case(
            name=name,
            summary=text,
            memory=tuple(memory),
            origin=origin,
            features=features,
            needs=tuple(needs),
            variants=tuple(variants),
            budget_s=budget_s,
            is_slow=slow,
            is_alone=alone,
            is_noisy=noisy,
            is_crossing=crossing,
            run=function,
        )
        return function

    return add


def load() -> dict[str, Case]:
    """Import every module of cases and return the cases by name, in the table's order."""
    place = _imported()
    if len(_in_order) != len(_cases):
        # A module may have been imported alone before, so its cases come first in `_cases`.
        last = len(place)
        order = sorted(_cases.values(), key=lambda case: place.get(case.run.__module__, last))
        _in_order.clear()
        _in_order.update((case.name, case) for case in order)
    return _in_order.copy()


# The cases in order. Every run of a case calls load(), so they are sorted only after new ones came.
_in_order: dict[str, Case] = {}


@cache
def _imported() -> dict[str, int]:
    from pyuffd.conformance.cases import MODULES

    names = [f"pyuffd.conformance.cases.{module}" for module in MODULES]
    for name in names:
        importlib.import_module(name)
    return {name: index for index, name in enumerate(names)}
