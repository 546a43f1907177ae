"""Scenarios for `_interruptions` with handlers: no page reads as zeros, and no access hangs."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from dataclasses import dataclass
from functools import partial

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PageSource,
    Region,
    RegisterMode,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers._checks import Driver
from tests.kernel._serving import wait_for_stalled
from tests.process._interruptions import Interrupter, Scenario

PAGE = 4096
PAGES = 8
HANGS_S = 10.0
# Longer than an interrupted stop() waits for a source.
SLOW_S = 0.5

CONTENT = bytes(range(1, 9)) * 512


def content(offset: int, length: int) -> bytes:
    """Return content without zeros."""
    return CONTENT * (length // len(CONTENT))


def slow_content(offset: int, length: int) -> bytes:
    """Return the same content late."""
    time.sleep(SLOW_S)
    return content(offset, length)


class Reader:
    """Start a thread that reads the first bytes of a page."""

    def __init__(self, region: Region, offset: int) -> None:
        self._place = f"offset {offset:#x}"
        self._seen: list[object] = []
        self._thread = threading.Thread(target=self._look, args=[region.start + offset])
        self._thread.daemon = True
        self._thread.start()

    def _look(self, address: int) -> None:
        self._seen.append(_memory.guarded_read(address, 8))

    def check(self) -> None:
        """Check that the read returned content or raised a signal: no zeros and no hang."""
        self._thread.join(HANGS_S)
        assert self._seen, f"reading {self._place} hangs"
        assert self._seen[0] != bytes(8), f"zeros at {self._place}"


def check_no_zeros(region: Region) -> None:
    """Read every page."""
    for offset in range(0, region.length, PAGE):
        Reader(region, offset).check()


@dataclass(frozen=True)
class Setting:
    """How a region is served."""

    driver: Driver
    kind: str = "anon"

    def uffd(self) -> Userfaultfd:
        """Open what the driver needs."""
        return Userfaultfd(
            features=(Feature.SIGBUS if self.driver == "inline" else Feature(0))
            | (Feature.MINOR_SHMEM if self.kind == "minor" else Feature(0))
            | (Feature.PAGEFAULT_FLAG_WP if self.kind == "protected" else Feature(0))
        )

    def region(self) -> Region:
        """Map the memory."""
        size = PAGES * PAGE
        return Region.memfd(size) if self.kind == "minor" else Region.anonymous(size)

    def source(self) -> PageSource:
        """Return a source of the kind that the driver is for."""
        if self.driver in ("process", "thread", "auto"):
            return CallableSource(content)
        return BufferSource(CONTENT * PAGES)

    def serve(
        self, handler: Handler, region: Region, source: PageSource, uffd: Userfaultfd | None = None
    ) -> None:
        """Serve the region with the arguments that belong to it."""
        if self.kind == "minor":
            handler.serve(region, source, mode=RegisterMode.MINOR, uffd=uffd)
        elif self.kind == "protected":
            handler.serve(region, source, mode=RegisterMode.MISSING | RegisterMode.WP, uffd=uffd)
        else:
            handler.serve(region, source, uffd=uffd)


def live(at: Interrupter, setting: Setting, armed: str) -> None:
    """A handler from start to end; `armed` names the part that is interrupted."""

    def part(name: str) -> contextlib.AbstractContextManager[None]:
        return at.armed() if name == armed else contextlib.nullcontext()

    source = setting.source()
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(setting.uffd())
        region = stack.enter_context(setting.region())
        handler: Handler | None = None
        with part("make"):
            handler = Handler(uffd, driver=setting.driver)
        if handler is None:  # another handler can be made
            gc.collect()
            handler = Handler(uffd, driver=setting.driver)
        stack.callback(handler.stop)
        served = False
        with part("serve"):
            setting.serve(handler, region, source)
            served = True
        if not served:
            # The region is served, or it is unchanged and can be served.
            with contextlib.suppress(ValueError):
                setting.serve(handler, region, source)
        early = Reader(region, PAGE) if setting.driver != "inline" else None
        if early is not None:
            wait_for_stalled(uffd, 1)
        with part("start"):
            handler.start()
        handler.start()
        if early is not None:
            early.check()
        if armed in ("serve", "start", "make"):
            check_no_zeros(region)
        else:
            region.touch(0, PAGE)
        with part("populate"):
            handler.populate(region, 2 * PAGE, PAGE)
        with part("unserve"):
            if armed == "unserve":
                handler.unserve(region)
        with part("stop"):
            handler.stop()
        handler.stop()
        check_no_zeros(region)


def use_with(at: Interrupter, setting: Setting) -> None:
    """Do everything in one with statement; afterwards close only what is left."""
    with setting.region() as region:
        served = False
        with setting.uffd() as uffd, at.armed(), Handler(uffd, driver=setting.driver) as handler:
            setting.serve(handler, region, setting.source())
            served = True
            region.touch(0, PAGE)
            handler.populate(region, PAGE, PAGE)
        if served:
            check_no_zeros(region)


def stop_while_one_waits(at: Interrupter, driver: Driver) -> None:
    """Stop a handler that has not started, or whose source is slow."""
    in_python = driver in ("process", "thread")
    source = CallableSource(slow_content) if in_python else BufferSource(CONTENT * PAGES)
    with Userfaultfd() as uffd, Region.anonymous(PAGES * PAGE) as region:
        handler = Handler(uffd, driver=driver)
        handler.serve(region, source)
        if in_python:
            handler.start()
        reader = Reader(region, PAGE)
        wait_for_stalled(uffd, 1)
        with at.armed():
            handler.stop()
        handler.stop()
        reader.check()
        check_no_zeros(region)
    # If a source did not answer in time, its thread is blocked and still uses the descriptor.
    give_up = time.monotonic() + HANGS_S
    while any(thread.name.startswith("uffd-w") for thread in threading.enumerate()):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    Userfaultfd().close()  # opening the next one cleans up


def serve_running(at: Interrupter, setting: Setting, *, of_another: bool) -> None:
    """Serve a range, perhaps of another userfaultfd, with a running handler."""
    with (
        setting.uffd() as uffd,
        setting.uffd() as another,
        setting.region() as region,
        Handler(uffd, driver=setting.driver) as handler,
    ):
        served = False
        owner = another if of_another else uffd
        with at.armed():
            setting.serve(handler, region, setting.source(), owner)
            served = True
        if not served:
            with contextlib.suppress(ValueError):
                setting.serve(handler, region, setting.source(), owner)
        check_no_zeros(region)


def serve_many(at: Interrupter) -> None:
    """Serve several regions by one call in C: each is served, or unchanged and can be served."""
    with (
        Userfaultfd() as uffd,
        Region.memfd(PAGES * PAGE) as file,
        contextlib.ExitStack() as stack,
        Handler(uffd) as handler,
    ):
        file.write(0, CONTENT * PAGES)
        source = stack.enter_context(FileSource(file.fd or 0))
        regions = [stack.enter_context(Region.anonymous(PAGES * PAGE)) for _ in range(3)]
        served = False
        with at.armed():
            handler._serve_many((region, source) for region in regions)
            served = True
        for region in regions:
            if not served:
                with contextlib.suppress(ValueError):
                    handler.serve(region, source)
            check_no_zeros(region)
            handler.unserve(region)
            assert not uffd._has_registered(region.start, region.start + region.length)


def close_region_under_its_handler(at: Interrupter) -> None:
    """The handler continues to serve."""
    with Userfaultfd() as uffd, Region.anonymous(PAGES * PAGE) as region, Handler(uffd) as handler:
        handler.serve(region, BufferSource(CONTENT * PAGES))
        region.touch(0, PAGE)
        with at.armed():
            region.close()
        region.close()
        handler.stats()


def close_userfaultfd_under_its_handler(at: Interrupter) -> None:
    """The userfaultfd is closed only after the handler has ended."""
    with Region.anonymous(PAGES * PAGE) as region, Userfaultfd() as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(CONTENT * PAGES))
        region.touch(0, PAGE)
        with at.armed():
            uffd.close()
        check_no_zeros(region)
        uffd.close()
        assert uffd.closed
        check_no_zeros(region)


def close_second_userfaultfd(at: Interrupter) -> None:
    """A second userfaultfd is closed only after its ranges were removed from the handler."""
    with (
        Region.anonymous(PAGES * PAGE) as region,
        Userfaultfd() as uffd,
        Userfaultfd() as second,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(CONTENT * PAGES), uffd=second)
        with at.armed():
            second.close()
        second.close()
        check_no_zeros(region)
        handler.stats()


def protect(at: Interrupter) -> None:
    """Write-protect and preserve: a write does not hang, and the old content is kept."""
    kept = bytearray(PAGES * PAGE)
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd) as handler,
    ):
        region.write(0, CONTENT * PAGES)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=kept, present="keep")
        protected = False
        with at.armed():
            handler.writeprotect(region)
            protected = True
            handler.preserve(region)
        region.write(0, b"w" * region.length)
        handler.stats()
        if protected:
            assert bytes(kept) == CONTENT * PAGES


def release_faults(at: Interrupter) -> None:
    """The second release() does what the first has left, long before the limit."""
    with Userfaultfd() as uffd, Region.anonymous(PAGES * PAGE) as region, Handler(uffd) as handler:
        handler.serve(region, BufferSource(CONTENT * PAGES))
        hold = handler.hold(4 * HANGS_S)
        with at.armed():
            hold.release()
        hold.release()
        assert not hold.expired
        Reader(region, PAGE).check()


DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process", "auto")
PARTS = ("make", "serve", "start", "populate", "unserve", "stop")
KINDS: tuple[tuple[Driver, str], ...] = (
    ("native", "minor"),
    ("process", "minor"),
    ("native", "protected"),
    ("thread", "protected"),
)
ENDS: tuple[Driver, ...] = ("native", "thread", "process")

HANDLERS: dict[str, Scenario] = {
    **{
        f"{driver}-{part}": partial(live, setting=Setting(driver), armed=part)
        for driver in DRIVERS
        for part in PARTS
    },
    **{
        f"{driver}-{kind}-{part}": partial(live, setting=Setting(driver, kind), armed=part)
        for driver, kind in KINDS
        for part in ("serve", "unserve", "stop")
    },
    **{f"{driver}-with": partial(use_with, setting=Setting(driver)) for driver in DRIVERS},
    **{f"{driver}-waiting": partial(stop_while_one_waits, driver=driver) for driver in ENDS},
    **{
        f"{driver}-running": partial(serve_running, setting=Setting(driver), of_another=False)
        for driver in DRIVERS
    },
    **{
        f"{driver}-second": partial(serve_running, setting=Setting(driver), of_another=True)
        for driver in DRIVERS
        if driver != "inline"
    },
    "many": serve_many,
    "region-closed": close_region_under_its_handler,
    "userfaultfd-closed": close_userfaultfd_under_its_handler,
    "second-closed": close_second_userfaultfd,
    "protect": protect,
    "release": release_faults,
}
