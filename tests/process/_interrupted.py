"""Scenarios for `_interruptions`: an armed part, and around it what a careful program does.

Run one: `python -m tests.process._interrupted SCENARIO lines|checks [FIRST END STEP]`, or
`SCENARIO signals RUNS`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import tempfile
import threading

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    Pagemap,
    Region,
    RegisterMode,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers._checks import Driver
from pyuffd.handover import connect_unix, listen_unix, recv_uffd, send_uffd
from tests.process._interruptions import LARGE, MARK, Interrupter, Scenario, main

PAGE = 4096
PAGES = 8
HANGS_S = 10.0


# One object at a time.


def open_userfaultfd(at: Interrupter) -> None:
    with at.armed(), Userfaultfd():
        pass


def adopt_userfaultfd(at: Interrupter) -> None:
    """If from_fd() raises the descriptor is the caller's, else the object's."""
    with Userfaultfd() as uffd:
        fd = os.dup(uffd.fileno())
        taken = None
        with at.armed():
            taken = Userfaultfd.from_fd(fd)
        if taken is None:
            os.close(fd)
        else:
            taken.close()


def detach_userfaultfd(at: Interrupter) -> None:
    uffd = Userfaultfd()
    fd = -1
    with at.armed():
        fd = uffd.detach()
    if fd >= 0:
        os.close(fd)
    uffd.close()


def map_anonymous(at: Interrupter) -> None:
    with at.armed(), Region.anonymous(LARGE, noreserve=True) as region:
        region.fill(1, 0, PAGE)


def map_memfd(at: Interrupter) -> None:
    with at.armed(), Region.memfd(PAGES * PAGE, seal=True) as region, region.alias() as alias:
        alias.fill(1)


def map_shared_memory(at: Interrupter) -> None:
    with at.armed(), Region.shm(MARK, PAGES * PAGE, unlink=True, reserve=True) as region:
        region.fill(1)


def keep_shared_memory(at: Interrupter) -> None:
    """The name stays if the constructor returned, and only then."""
    made = None
    with at.armed():
        made = Region.shm(MARK, PAGES * PAGE)
    if made is not None:
        made.close()
        os.unlink(f"/dev/shm/{MARK}")


def map_existing_shared_memory(at: Interrupter) -> None:
    """A name that was there before is removed at the end of a region, not of an attempt."""
    made = None
    Region.shm(MARK, PAGES * PAGE).close()
    with at.armed():
        made = Region.shm(MARK, PAGES * PAGE, unlink=True)
    if made is not None:
        made.close()
    else:
        os.unlink(f"/dev/shm/{MARK}")


def map_file(at: Interrupter) -> None:
    with tempfile.NamedTemporaryFile(prefix=MARK) as file:
        file.truncate(PAGES * PAGE)
        with at.armed(), Region.file(file.name) as region:
            region.fill(1)


def close_region(at: Interrupter) -> None:
    """A close that was interrupted goes on when it is called again."""
    region = Region.shm(MARK, PAGES * PAGE, unlink=True)
    with at.armed():
        region.close()
    region.close()
    assert region.closed


def view_region(at: Interrupter) -> None:
    """What was interrupted keeps no region from being closed."""
    with Region.memfd(PAGES * PAGE) as region, at.armed():
        region.memoryview().release()
        region.digest()


def open_pagemap(at: Interrupter) -> None:
    with Region.anonymous(PAGE) as region, at.armed(), Pagemap() as pagemap:
        pagemap.read(region)


def open_file_source(at: Interrupter) -> None:
    with at.armed(), FileSource("/proc/self/exe") as source:
        source.read(0, PAGE)


def refuse_file_source(at: Interrupter) -> None:
    with at.armed(), contextlib.suppress(ValueError):
        FileSource("/proc/self/exe", offset=1 << 40)


# A handler from beginning to end, with one part of it armed.

CONTENT = bytes(range(1, 9)) * 512


def content(offset: int, length: int) -> bytes:
    """Return content without a zero in it."""
    return CONTENT * (length // len(CONTENT))


def check_no_zeros(region: Region) -> None:
    """Read every page: content or a signal, never zeros, and never a hang."""
    for offset in range(0, region.length, PAGE):
        seen: list[object] = []
        reader = threading.Thread(target=_look, args=(seen, region.start + offset), daemon=True)
        reader.start()
        reader.join(HANGS_S)
        assert seen, f"reading offset {offset:#x} hangs"
        assert seen[0] != bytes(8), f"zeros at offset {offset:#x}"


def _look(seen: list[object], address: int) -> None:
    seen.append(_memory.guarded_read(address, 8))


def serve(at: Interrupter, driver: Driver, armed: str) -> None:
    """Serve a region; `armed` names the part that is interrupted."""

    def part(name: str) -> contextlib.AbstractContextManager[None]:
        return at.armed() if name == armed else contextlib.nullcontext()

    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    in_python = driver in ("process", "thread", "auto")
    source = CallableSource(content) if in_python else BufferSource(CONTENT * PAGES)
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(Userfaultfd(features=features))
        region = stack.enter_context(Region.anonymous(PAGES * PAGE))
        handler: Handler | None = None
        with part("make"):
            handler = Handler(uffd, driver=driver)
        if handler is None:  # another one can be made
            gc.collect()
            handler = Handler(uffd, driver=driver)
        stack.callback(handler.stop)
        served = False
        with part("serve"):
            handler.serve(region, source)
            served = True
        if not served:
            # Either it is served, or it is as before and can be.
            with contextlib.suppress(ValueError):
                handler.serve(region, source)
        with part("start"):
            handler.start()
        handler.start()
        if armed in ("serve", "start", "make"):
            check_no_zeros(region)
        else:
            region.touch(0, PAGE)
        with part("populate"):
            handler.populate(region, PAGE, PAGE)
        with part("unserve"):
            if armed == "unserve":
                handler.unserve(region)
        with part("stop"):
            handler.stop()
        handler.stop()
        check_no_zeros(region)


def serving(driver: Driver, armed: str) -> Scenario:
    """Return a scenario of a handler's life."""

    def scenario(at: Interrupter) -> None:
        serve(at, driver, armed)

    return scenario


def close_region_under_its_handler(at: Interrupter) -> None:
    with Userfaultfd() as uffd, Region.anonymous(PAGES * PAGE) as region, Handler(uffd) as handler:
        handler.serve(region, BufferSource(CONTENT * PAGES))
        region.touch(0, PAGE)
        with at.armed():
            region.close()
        region.close()
        handler.stats()


def close_userfaultfd_under_its_handler(at: Interrupter) -> None:
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
    """Write-protect and preserve: a write does not hang."""
    kept = bytearray(PAGES * PAGE)
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd) as handler,
    ):
        region.fill(1)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=kept)
        with at.armed():
            handler.writeprotect(region)
            handler.preserve(region)
        region.write(0, b"w" * region.length)


def hand_over(at: Interrupter) -> None:
    """What came over a socket is the Handover's, or nobody's."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.memfd(PAGE) as region:
        send_uffd(theirs, uffd, [region], memory=True)
        with at.armed(), recv_uffd(ours) as handover:
            assert handover.regions[0].fd is not None


def listen(at: Interrupter) -> None:
    path = f"{tempfile.gettempdir()}/{MARK}"
    with at.armed(), listen_unix(path) as listener, connect_unix(path), listener.accept():
        pass


def close_listener(at: Interrupter) -> None:
    listener = listen_unix(f"{tempfile.gettempdir()}/{MARK}")
    with at.armed():
        listener.close()
    listener.close()


OBJECTS: list[Scenario] = [
    hand_over,
    listen,
    close_listener,
    open_userfaultfd,
    adopt_userfaultfd,
    detach_userfaultfd,
    map_anonymous,
    map_memfd,
    map_shared_memory,
    keep_shared_memory,
    map_existing_shared_memory,
    map_file,
    close_region,
    view_region,
    open_pagemap,
    open_file_source,
    refuse_file_source,
]
PARTS = ["make", "serve", "start", "populate", "unserve", "stop"]
DRIVERS: list[Driver] = ["native", "inline", "thread", "process", "auto"]
WHOLE: list[Scenario] = [
    close_region_under_its_handler,
    close_userfaultfd_under_its_handler,
    close_second_userfaultfd,
    protect,
]
SCENARIOS: dict[str, Scenario] = {one.__name__: one for one in OBJECTS + WHOLE} | {
    f"{driver}-{part}": serving(driver, part) for driver in DRIVERS for part in PARTS
}

if __name__ == "__main__":
    main(SCENARIOS)
