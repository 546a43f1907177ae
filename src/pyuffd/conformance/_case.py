"""Cases as data: what a case is, and the table of all of them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pyuffd._abi import Feature
from pyuffd.conformance._types import ALL, ANY
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType

if TYPE_CHECKING:
    from pyuffd.conformance._context import Context
    from pyuffd.testing._need import Need

_NO_FEATURE = Feature(0)
# `<op>.<errno or ok>.<condition>`, `kselftest.<case>`, `wp-series.<patch>.<behaviour>`, ...
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
DEFAULT_BUDGET_S = 20.0  # a hundred times as long as a case runs on an idle machine

Features = Feature | Callable[[MemoryType], Feature]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the behaviours a case accepts, and how user space tells that it has this one.

    Attributes:
        name: What the report shows.
        text: How it behaves, and how to tell, in one line.
        features: Accepted only where the kernel has all of these.
        lacks: Accepted only where the kernel has none of these.
    """

    name: str
    text: str
    features: Feature = _NO_FEATURE
    lacks: Feature = _NO_FEATURE

    def possible(self, offered: int) -> bool:
        """Return whether a kernel with these feature bits may behave so."""
        return not int(self.features) & ~offered and not int(self.lacks) & offered


@dataclass(frozen=True, slots=True)
class Case:
    """One behaviour, on one or more memory types.

    Attributes:
        name: The id without the memory type.
        summary: The behaviour in one line.
        memory: Names of the memory types it runs on; "any" where none matters.
        origin: Where it comes from: a selftest's case, a patch, a manual page's ERRORS entry.
        features: Feature bits the kernel must have, for one memory type or all of them.
        needs: What else it needs: ioctls, privileges, swap, hardware.
        variants: The behaviours it accepts, if there is more than one.
        budget_s: Seconds after which the case has stalled.
        is_slow: Left out unless asked for.
        run: The case itself.
        is_alone: It does something to the whole machine, so no other case runs meanwhile.
        is_crossing: It is one of a table of combinations, which the page of the suite shows as
            such; a part of them is a fair sample.
        is_noisy: The kernel may log warnings about what it does; they are not reported, unless
            they say that the kernel is broken.
    """

    name: str
    summary: str
    memory: tuple[str, ...]
    origin: str
    features: Features
    needs: tuple[Need, ...]
    variants: tuple[Variant, ...]
    budget_s: float
    is_slow: bool
    run: Callable[[Context], None]
    is_alone: bool = False
    is_noisy: bool = False
    is_crossing: bool = False

    def features_on(self, memory: MemoryType) -> Feature:
        """Return the feature bits it needs on a memory type."""
        return self.features if isinstance(self.features, Feature) else self.features(memory)

    def id_on(self, memory: str) -> str:
        """Return the id of the case on a memory type."""
        return f"{self.name}.{memory}"

    @property
    def ids(self) -> list[str]:
        """The ids, one for each memory type."""
        return [self.id_on(memory) for memory in self.memory]


_cases: dict[str, Case] = {}


def case(
    name: str,
    *,
    origin: str,
    memory: Sequence[str] = ALL,
    features: Features = _NO_FEATURE,
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
        slow: Leave it out unless asked for.
        alone: Let no other case of this user run meanwhile, in whichever process.
        noisy: Leave out of the report what the kernel warns of meanwhile, short of a WARN; only
            for one that is alone, since all cases see the same log.
        crossing: It is one of a table of combinations.
        summary: For functions that several cases share.

    Raises:
        ValueError: a bad or known name, or no summary.
    """

    def add(function: Callable[[Context], None]) -> Callable[[Context], None]:
        text = summary or (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        if not _NAME.fullmatch(name) or name in _cases:
            raise ValueError(f"case {name!r}: not an id, or there is one already")
        if not text:
            raise ValueError(f"case {name!r} has no summary")
        if noisy and not alone:
            raise ValueError(f"case {name!r} is noisy, so it has to run alone")
        if unknown := set(memory) - {*MEMORY_TYPES, *ANY}:
            raise ValueError(f"case {name!r}: no memory types {sorted(unknown)}")
        _cases[name] = Case(
            name,
            text,
            tuple(memory),
            origin,
            features,
            tuple(needs),
            tuple(variants),
            budget_s,
            slow,
            function,
            alone,
            noisy,
            crossing,
        )
        return function

    return add


def load() -> dict[str, Case]:
    """Import every module of cases and return the cases by name, in the table's order."""
    place = _imported()
    if len(_in_order) != len(_cases):
        # One of them may have been imported by itself before.
        last = len(place)
        order = sorted(_cases.values(), key=lambda case: place.get(case.run.__module__, last))
        _in_order.clear()
        _in_order.update((case.name, case) for case in order)
    return _in_order.copy()


# Each case that runs is looked up among all: they are sorted when there are more than before.
_in_order: dict[str, Case] = {}


@cache
def _imported() -> dict[str, int]:
    from pyuffd.conformance.cases import MODULES

    names = [f"pyuffd.conformance.cases.{module}" for module in MODULES]
    for name in names:
        importlib.import_module(name)
    return {name: index for index, name in enumerate(names)}
