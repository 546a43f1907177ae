"""Writes that write-protection does not see: pages merged by KSM, and how that is noticed."""

from __future__ import annotations

import contextlib
import fcntl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import (
    Feature,
    Handler,
    HandlerError,
    PageBit,
    Pagemap,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd._describe import counted
from pyuffd.testing import needs_privilege
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE

KSM = Path("/sys/kernel/mm/ksm")
MADV_MERGEABLE, MADV_UNMERGEABLE = 12, 13
PAGES = 64
LIMIT_S = 40 * SCALE  # ksmd is nice, and others may want the CPUs


def needs_ksm() -> pytest.MarkDecorator:
    """Skip unless the kernel has KSM and it is not in use."""

    def missing() -> tuple[list[str], str]:
        if not KSM.exists():
            return ["ksm"], "there is no CONFIG_KSM"
        with ksm_locked(fcntl.LOCK_SH):
            run = (KSM / "run").read_text().strip()
        return ([] if run == "0" else ["ksm"]), f"it is {run}"

    return marked(Need("KSM that is off", missing))


@contextlib.contextmanager
def ksm_locked(how: int) -> Iterator[None]:
    """Wait for other tests that use KSM, which would merge pages again."""
    with (KSM / "run").open() as file:
        fcntl.flock(file, how)
        yield


def wait_for_merging(region: Region) -> None:
    """Wait until ksmd has merged every page of a region."""
    deadline = time.monotonic() + LIMIT_S
    while (merged := merged_pages(region)) < PAGES:
        assert time.monotonic() < deadline, f"{merged} merged; run is {(KSM / 'run').read_text()}"
        time.sleep(0.01)


def merged_pages(region: Region) -> int:
    """Return how many pages of a region smaps calls merged."""
    found, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start < region.start + region.length and region.start < end
            elif first == "KSM:" and inside:
                found += int(line.split()[1]) * 1024 // PAGE
    return found


@contextlib.contextmanager
def ksm_running() -> Iterator[None]:
    settings = {"sleep_millisecs": 1, "pages_to_scan": 5000, "run": 1}
    old = {name: (KSM / name).read_text() for name in settings}
    try:
        for name, value in settings.items():
            (KSM / name).write_text(str(value))
        yield
    finally:
        for name, text in old.items():
            (KSM / name).write_text(text)


def merged() -> None:
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
    with (
        ksm_locked(fcntl.LOCK_EX),
        Userfaultfd(features=features) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Pagemap() as pagemap,
        Handler(uffd) as handler,
    ):
        region.fill(7)
        image = bytearray(region.length)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=image)
        handler.writeprotect(region)
        assert pagemap.read(region).count(PageBit.UFFD_WP) == PAGES
        region.madvise(MADV_MERGEABLE)
        with ksm_running():
            wait_for_merging(region)
        protected = pagemap.read(region).count(PageBit.UFFD_WP)
        assert protected < PAGES
        # The page table shows it: a page without protection counts as written, though it is not.
        states = handler.page_states(region)
        assert states.count(PageState.CLEAN) == protected
        assert states.count(PageState.DIRTY) == PAGES - protected
        for page in range(PAGES):
            region.write(page * PAGE, b"new")
        # Those writes caused no fault, so the old content was not saved.
        assert handler.stats().faults["wp"] == handler.stats().preserved_pages == protected
        assert image.count(b"\7" * PAGE) == protected
        assert set(handler.page_states(region)) == {PageState.DIRTY}
        with pytest.warns(RuntimeWarning, match="MADV_UNMERGEABLE"):
            handler.writeprotect(region)
        region.madvise(MADV_UNMERGEABLE)


@needs_ksm()
@needs_privilege("CAP_SYS_ADMIN")
def test_merging_drops_protection() -> None:
    """On Linux 6.18 the states err on the safe side, and `preserve` misses writes.

    If this fails on a kernel that keeps the protection, look at what it does.
    """
    run_child(merged, budget_s=100)


def preserved() -> None:
    """`preserve` saves what merged pages hold by then, and stop() says how many may be wrong."""
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
    with (
        ksm_locked(fcntl.LOCK_EX),
        Userfaultfd(features=features) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Pagemap() as pagemap,
    ):
        region.fill(7)
        image = bytearray(region.length)
        handler = Handler(uffd)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=image)
        handler.start()
        handler.writeprotect(region)
        region.madvise(MADV_MERGEABLE)
        with ksm_running():
            wait_for_merging(region)
        merged = PAGES - pagemap.read(region).count(PageBit.UFFD_WP)
        assert merged > 0
        for page in range(0, PAGES, 2):
            region.write(page * PAGE, b"new")
        in_time = handler.stats().preserved_pages
        assert handler.preserve(region) == (PAGES - in_time) * PAGE
        new = sum(image.startswith(b"new", page * PAGE) for page in range(PAGES))
        assert new == PAGES // 2 - in_time
        assert handler.page_states(region).count(PageState.DIRTY) == merged + in_time
        with pytest.raises(HandlerError, match="no longer protected") as caught:
            handler.stop()
        assert f"({counted(merged, 'page')} in all)" in str(caught.value)


@needs_ksm()
@needs_privilege("CAP_SYS_ADMIN")
def test_preserve_of_merged_pages() -> None:
    run_child(preserved, budget_s=100)


def noticed(when: str) -> None:
    features = Feature.PAGEFAULT_FLAG_WP
    with (
        Userfaultfd(features=features) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Region.anonymous(PAGE) as other,
        Handler(uffd) as handler,
    ):
        if when == "before":
            region.madvise(MADV_MERGEABLE)
            with pytest.warns(RuntimeWarning, match="KSM"):
                handler.serve(region, None, mode=RegisterMode.WP)
        else:
            handler.serve(region, None, mode=RegisterMode.WP)
            region.madvise(MADV_MERGEABLE)
            with pytest.warns(RuntimeWarning, match="KSM"):
                handler.writeprotect(region)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handler.writeprotect(region)  # said once
            handler.serve(other, None, mode=RegisterMode.WP)


@needs_ksm()
@pytest.mark.parametrize("when", ["before", "after"])
def test_mergeable_memory_is_noticed(when: str) -> None:
    run_child(noticed, when)
