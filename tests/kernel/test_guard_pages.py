"""Guard pages (MADV_GUARD_INSTALL) in served memory: who keeps them, and what replaces them."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd._memory import Interrupted
from pyuffd.testing import needs
from pyuffd.testing._need import Lack
from pyuffd.testing._skips import skip
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import wait_until

GUARD_INSTALL = 102
PAGES = 4

pytestmark = needs(Feature.POISON)


def install(region: Region, page: int) -> None:
    try:
        region.madvise(GUARD_INSTALL, page * PAGE, PAGE)
    except UffdOSError as error:
        if error.errno != errno.EINVAL:
            raise
        skip(Lack(["guard-regions"], "this kernel has no MADV_GUARD_INSTALL"))


def is_guard(region: Region, page: int) -> bool:
    found = _memory.guarded_read(region.start + page * PAGE, 1)
    return isinstance(found, Interrupted) and found.number == signal.SIGSEGV


def touch_the_neighbour(handler: Handler, region: Region) -> None:
    region.read(0, 1)
    wait_until(lambda: handler.stats().filled_pages >= 1, "a page")


USES: dict[str, Callable[[Handler, Region], object]] = {
    "fault": touch_the_neighbour,
    "prefetch": touch_the_neighbour,
    "populate": lambda handler, region: handler.populate(region),
    "load": lambda handler, region: handler.load(region),
    "fill": lambda handler, region: handler.fill(region, 0, bytes(PAGES * PAGE)),
    "stop": lambda handler, _: handler.stop(),
}
# UFFDIO_COPY puts a page in place of a guard; UFFDIO_ZEROPAGE and UFFDIO_POISON do not.
REPLACED = {
    ("buffer", "prefetch"),
    ("buffer", "populate"),
    ("buffer", "load"),
    ("buffer", "fill"),
    ("zero", "fill"),
}


def use(source: str, name: str) -> bool:
    """Use memory with a guard page; return whether it is still there."""
    ahead = PAGES * PAGE if name == "prefetch" else 0
    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd, prefetch=ahead) as handler,
    ):
        data = BufferSource(b"x" * PAGES * PAGE)
        handler.serve(region, ZeroSource() if source == "zero" else data)
        install(region, 2)
        USES[name](handler, region)
        if name == "prefetch":
            wait_until(lambda: handler.stats().prefetched_pages >= 2, "pages ahead")
        return is_guard(region, 2)


@pytest.fixture(autouse=True)
def has_guard_pages() -> None:
    with Region.anonymous(PAGE) as region:
        install(region, 0)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("source", ["buffer", "zero"])
def test_a_guard_page(source: str, name: str) -> None:
    """A touch of it is SIGSEGV at once, and asks no handler; filling ahead replaces it."""
    still_there = run_child(use, source, name).value
    assert still_there == ((source, name) not in REPLACED)
