"""uffd-stress: many threads fault in one area, resolved in every way at once (layer L5)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pyuffd.conformance._case import case, load
from pyuffd.conformance._context import Context
from pyuffd.conformance._memcg import limited_memory, needs_memcg
from pyuffd.conformance._stress import MODES, stress
from pyuffd.conformance._types import (
    SMALL,
    missing_wp_features,
)
from pyuffd.testing._need import needs_swap

PAGES, HUGE_PAGES = 256, 6
# Each of the two areas has this many pages: with the interpreter's 20 MiB they exceed the limit.
PRESSED_PAGES = (40 << 20) // 4096
LIMIT = 40 << 20
PRESSED_MODES = range(8)
PRESSED_BUDGET_S = 240.0
STRESS_BUDGET_S = 60.0


@case(
    "kselftest.stress",
    origin="uffd-stress, write-protection on",
    features=missing_wp_features,
    budget_s=STRESS_BUDGET_S,
)
def uffd_stress(ctx: Context) -> None:
    """In all 16 bounce modes no page is lost, torn or copied twice; missing, WP, EEXIST occur."""
    stress(ctx, HUGE_PAGES if ctx.memory.is_hugetlb else PAGES, range(MODES))


def pressed(name: str, memory: str) -> None:
    """Run the stress below the memory limit; for a process of its own."""
    context = Context(load()[name], memory)
    with contextlib.closing(context), limited_memory(LIMIT):
        stress(context, PRESSED_PAGES, PRESSED_MODES)


@case(
    "kselftest.stress-swapping",
    origin="uffd-stress below a memory limit",
    memory=SMALL,
    features=missing_wp_features,
    needs=[needs_swap(), needs_memcg()],
    budget_s=PRESSED_BUDGET_S + 30,
    slow=True,
)
def uffd_stress_swapping(ctx: Context) -> None:
    """Below a memory limit that makes the areas swap, no page is lost, torn or copied twice."""
    swapped = _swapped_out()
    ctx.run_child(pressed, ctx.case.name, ctx.memory.name, budget_s=PRESSED_BUDGET_S)
    ctx.expect("whether pages were swapped out", _swapped_out() > swapped, True)


def _swapped_out() -> int:
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["pswpout"])
