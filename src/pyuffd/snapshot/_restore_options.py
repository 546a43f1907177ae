"""The options of `Snapshot.restore`, checked before anything happens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pyuffd._arguments import check_bools, check_choice, check_int, check_rate, shown
from pyuffd._recording import Until, check_until
from pyuffd._working_set import WorkingSet
from pyuffd.handlers import Handler
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._content import GAPS, Gaps

Mode = Literal["auto", "copy", "minor", "map"]
UsedMode = Literal["copy", "minor", "map"]
MODES = ("auto", "copy", "minor", "map")
Verify = Literal["first", "drain", "no"]
VERIFY = ("first", "drain", "no")
# More threads than this wait for each other in the kernel.
THREADS_MOST = 4
THREADS_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Options:
    """How a restore is done; `Snapshot.restore` describes it."""

    mode: Mode
    gaps: Gaps
    verify: Verify
    handler: Handler | None
    threads: int
    rate: float | None
    paused: bool
    working_set: str | WorkingSet | None = None
    record: str | None = None
    record_until: Until = "settled"


def checked(
    *,
    mode: Mode,
    gaps: Gaps,
    verify: Verify,
    handler: Handler | None,
    threads: int | None,
    rate: float | None,
    paused: bool,
    working_set: str | WorkingSet | None = None,
    record: str | None = None,
    record_until: Until = "settled",
) -> Options:
    """Check options; ValueError before anything happens."""
    check_bools(paused=paused)
    for name, value, known in (
        ("mode", mode, MODES),
        ("gaps", gaps, GAPS),
        ("verify", verify, VERIFY),
    ):
        check_choice(name, value, known)
    if handler is not None and not isinstance(handler, Handler):
        raise TypeError(f"handler must be a Handler, not {shown(handler)}")
    if handler is not None and mode in ("map", "minor"):
        raise ValueError(f"mode={mode!r} maps the memory itself, and cannot use your handler")
    if isinstance(working_set, str):
        _working_sets.check_name(working_set)
    if record is not None:
        _working_sets.check_name(record)
        if mode == "map":
            raise ValueError("mode='map' has no faults that could be recorded")
        if handler is not None and not handler._options["fault_log"]:
            raise ValueError("record: the handler was made without fault_log=")
    if threads is None:
        threads = min(len(os.sched_getaffinity(0)), THREADS_MOST)
    check_int("threads", threads, 1, THREADS_LIMIT + 1)
    return Options(
        mode,
        gaps,
        verify,
        handler,
        threads,
        check_rate(rate),
        bool(paused),
        working_set,
        record,
        check_until(record_until),
    )
