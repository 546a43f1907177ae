"""Overlays crossed with forks, served parts, moves, and the verbs of a handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    OverlaySource,
    PageState,
    Region,
    RegisterMode,
    ZeroSource,
    _memory,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._serving import content, in_fork, serving, states, wait_until
from tests.kernel.test_overlays import image, numbered

PAGES = 6
LAYOUT = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
TRACKING = Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP


class Setting(NamedTuple):
    """A served overlay, and all of its bytes as its own `read` gives them."""

    handler: Handler
    region: Region
    overlay: OverlaySource
    want: bytes

    def page(self, index: int) -> bytes:
        size = self.region.page_size
        return self.want[index * size : (index + 1) * size]


def overlay_of(kind: str, first: FileSource, size: int) -> OverlaySource:
    """Two files, zeros and gaps; kind `python` has a page, and a part of a page, of a function."""
    pieces: list[Any] = [
        (0, 4 * size, first),
        (size, 100, ZeroSource()),
        (2 * size - 50, 70, first),
        (5 * size, size, first),
    ]
    if kind == "python":
        pieces += [(size, size, CallableSource(numbered)), (3 * size + 96, 200, numbered)]
    return OverlaySource(pieces, gaps="zeros", length=PAGES * size)


def forked(at: Setting) -> None:
    """A fork finds the same bytes in pages that were missing, and in a page that was there."""
    assert at.region.read(0, at.region.page_size) == at.page(0)

    def child() -> None:
        assert at.region.read() == at.want

    assert in_fork(child) == 0
    assert at.region.read() == at.want
    wait_until(lambda: at.handler.spaces == 1, "the fork is followed no longer")


def part_by_another(at: Setting) -> None:
    """Two pages are served by another overlay; those around them by the first."""
    size = at.region.page_size
    at.handler.unserve(at.region[size : 3 * size])
    at.handler.serve(at.region[size : 3 * size], at.overlay, present="drop")
    again = at.want[: 2 * size]
    assert at.region.read() == at.want[:size] + again + at.want[3 * size :]


def parts_in_a_fork(at: Setting) -> None:
    """The parts that are still served are served in a fork too."""
    size = at.region.page_size
    at.handler.unserve(at.region[4 * size :])

    def child() -> None:
        assert at.region.read(0, 4 * size) == at.want[: 4 * size]

    assert in_fork(child) == 0
    assert at.region.read(0, 4 * size) == at.want[: 4 * size]
    wait_until(lambda: at.handler.spaces == 1, "the fork is followed no longer")


def moved(at: Setting) -> None:
    """A moved page is asked for by the offset that it had."""
    size = at.region.page_size
    to = _memory.mmap(2 * size, 0, 0x22)  # MAP_PRIVATE | MAP_ANONYMOUS
    _memory.mremap(at.region.start + 2 * size, 2 * size, 2 * size, 3, to)
    try:
        assert _memory.read(to, 2 * size) == at.page(2) + at.page(3)
        assert at.region.read(0, 2 * size) == at.page(0) + at.page(1)
    finally:
        at.handler.unserve(at.region)
        _memory.munmap(to, 2 * size)


def filled(at: Setting) -> None:
    """What is filled first stays; the rest comes from the overlay."""
    size = at.region.page_size
    data = content(size, seed=5)
    at.handler.fill(at.region, size, data)
    at.handler.fill(at.region, 3 * size, data)
    want = at.page(0) + data + at.page(2) + data + at.want[4 * size :]
    assert at.region.read() == want


def evicted(at: Setting) -> None:
    """Evicted pages come from the overlay again, whatever was written to them."""
    size = at.region.page_size
    at.handler.populate(at.region)
    for index in range(PAGES):
        at.region.write(index * size + 99, b"written")
    at.handler.evict(at.region, size, 3 * size, write_back=None)
    assert states(at.handler, at.region)[1:4] == [PageState.ABSENT] * 3
    assert at.region.read(size, 3 * size) == at.want[size : 4 * size]
    assert at.region.read(99, 7) == b"written"


def checked(at: Setting) -> None:
    """A checkpoint names the written pages only."""
    size = at.region.page_size
    at.handler.populate(at.region)
    at.handler.checkpoint(at.region)
    for index in (1, 3):
        at.region.write(index * size, b"x")
    found = at.handler.checkpoint(at.region)
    written = [(one.start // size, one.end // size) for one in found.written]
    assert written == [(1, 2), (3, 4)]


class Case(NamedTuple):
    run: Callable[[Setting], None]
    features: Feature = Feature(0)
    mode: RegisterMode = MISSING
    drivers: tuple[str, ...] = ("native", "thread", "process")
    memory: tuple[str, ...] = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")


CASES = {
    "fork": Case(forked, Feature.EVENT_FORK),
    "fork-of-parts": Case(parts_in_a_fork, Feature.EVENT_FORK),
    # A private mapping of a file shows the page cache without its own copies: "drop" is refused.
    "part": Case(part_by_another, memory=("anon", "shmem", "hugetlb")),
    "moved": Case(moved, LAYOUT, memory=("anon", "shmem")),
    "filled": Case(filled),
    "evicted": Case(evicted, TRACKING, MISSING | WP, ("native", "thread")),
    "checkpoint": Case(checked, TRACKING, MISSING | WP),
}


def crossed(driver: Any, name: str) -> None:
    size = 2 << 20 if name.startswith("hugetlb") else PAGE
    kinds = ("c",) if driver == "native" else ("c", "python")
    mine = {
        title: case
        for title, case in CASES.items()
        if driver in case.drivers and name in case.memory
    }
    with image(content(PAGES * size)) as path, FileSource(path) as first:
        for features in {case.features for case in mine.values()}:
            # One handler for all with these features: to start the helper process is expensive.
            with serving(driver, name, features) as (handler, memory):
                handler.start()
                for title, case in mine.items():
                    for kind in kinds if case.features == features else ():
                        overlay = overlay_of(kind, first, size)
                        region = memory.pages(PAGES)
                        want = overlay.read(0, PAGES * size)
                        handler.serve(region, overlay, mode=case.mode)
                        try:
                            case.run(Setting(handler, region, overlay, want))
                        except BaseException as error:
                            error.add_note(f"case {title}, overlay {kind}")
                            raise


@pytest.mark.crossing
@needs(TRACKING | LAYOUT | Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
@pytest.mark.parametrize("name", memory_params())
def test_crossed(driver: str, name: str) -> None:
    run_child(crossed, driver, name, budget_s=40)
