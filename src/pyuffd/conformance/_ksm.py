"""ksmd, which merges equal pages of MADV_MERGEABLE memory; for cases that run alone."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE

MERGEABLE, UNMERGEABLE = 12, 13  # MADV_*
_KSM = Path("/sys/kernel/mm/ksm")
_PFN_MASK = (1 << 55) - 1
_POLL_S = 0.005  # ksmd reports nothing that could be waited for
_SCANS = 3  # the rest of the current one, one for the checksums, and one that merges


def require(ctx: Context) -> None:
    """Skip the case if the kernel cannot merge pages."""
    if not _KSM.exists():
        ctx.lack("KSM", "there is no CONFIG_KSM")


@contextmanager
def running() -> Iterator[None]:
    """Let ksmd run without a pause."""
    names = ("run", "sleep_millisecs", "pages_to_scan")
    with (_KSM / "run").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # wait for others that switch it on and off
        knobs = {name: (_KSM / name).read_text() for name in names}
        try:
            (_KSM / "pages_to_scan").write_text("1000")
            (_KSM / "sleep_millisecs").write_text("0")
            (_KSM / "run").write_text("1")
            yield
        finally:
            for name, value in reversed(knobs.items()):
                (_KSM / name).write_text(value.strip())


def frames(*regions: Region) -> list[int]:
    """Return the page frame of every page."""
    found = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for region in regions:
            length, at = region.length // SMALL_PAGE * 8, region.start // SMALL_PAGE * 8
            raw = os.pread(pagemap.fileno(), length, at)
            found += [
                int.from_bytes(raw[i : i + 8], "little") & _PFN_MASK for i in range(0, length, 8)
            ]
    return found


def wait_until_merged(ctx: Context, region: Region) -> None:
    """Wait until all pages of a region are merged into one.

    Raises:
        Mismatch: they are not merged in time.
    """
    deadline = time.monotonic() + WAIT_S
    while len(seen := set(frames(region))) > 1:
        if time.monotonic() > deadline:
            ctx.fail(f"page frames after {WAIT_S:g} s", sorted(seen), "one")
        time.sleep(_POLL_S)


def wait_until_scanned(ctx: Context, *regions: Region) -> None:
    """Wait until all pages are merged, or ksmd has scanned them often enough to merge them.

    Raises:
        Mismatch: ksmd does not finish its scans in time.
    """
    last = _scans() + _SCANS
    deadline = time.monotonic() + WAIT_S
    while len(set(frames(*regions))) > 1 and (done := _scans()) < last:
        if time.monotonic() > deadline:
            ctx.fail(f"scans of ksmd after {WAIT_S:g} s", done, last)
        time.sleep(_POLL_S)


def _scans() -> int:
    return int((_KSM / "full_scans").read_text())
