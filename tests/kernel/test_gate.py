"""A thread that fills many pages lets the engine read faults in between."""

from __future__ import annotations

import os
import threading

from pyuffd import Feature, Handler, Region, Userfaultfd
from pyuffd._abi import PageCategory
from pyuffd.pagemap import Pagemap
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._memory import PAGE
from tests.kernel._serving import wait_until

PAGES = 256
STEP_PAGES = 16  # GATE_STEP of csrc/engine/populate.c
FUTEX = "202"

pytestmark = needs(Feature.EVENT_REMOVE)


def waits_for_the_gate(fd: int) -> bool:
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/comm") as comm:
                name = comm.read().strip()
            with open(f"/proc/self/task/{tid}/syscall") as syscall:
                number = syscall.read().split()[0]
        except OSError:
            continue
        if name == f"uffd-h{fd}":
            return number == FUTEX
    return False


def present(region: Region) -> int:
    with Pagemap() as pagemap:
        found = pagemap.scan(region.start, region.length, category_anyof_mask=PageCategory.PRESENT)
        return found.ranges.pages()


def test_a_fault_waits_for_one_step_of_a_fill() -> None:
    """With layout events, messages are read in an exclusive section: a fill must leave its own."""
    content = bytes(range(1, 251)).ljust(PAGE, b"x") * PAGES
    with (
        Userfaultfd(features=Feature.EVENT_REMOVE) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd, driver="native") as handler,
    ):
        handler.serve(region, content)
        with holding(Point.STEP_READ) as reads:
            with holding(Point.FILL_CLAIMED) as fills:
                filler = threading.Thread(target=handler.populate, args=(region,))
                filler.start()
                fills.wait()
                reader = threading.Thread(target=region.read, args=((PAGES - 1) * PAGE, 1))
                reader.start()
                wait_until(lambda: waits_for_the_gate(uffd.fileno()), "the engine waits")
            reads.wait()
            filled = present(region)
        filler.join()
        reader.join()
        assert region.read() == content
    assert STEP_PAGES <= filled <= 2 * STEP_PAGES
