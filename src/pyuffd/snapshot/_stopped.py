"""Copy everything in the stop."""

from __future__ import annotations

import time

from pyuffd.pagemap import PageRanges
from pyuffd.remote import _stop as stopping
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import Captured, Frame, Frames, Layout, Options, at_barrier
from pyuffd.snapshot._writer import Writer


def captured(process: Process, layout_of: Layout, writer: Writer, options: Options) -> Captured:
    """Write the memory of a process at one instant; see `_methods.capture`."""
    result = Captured("stopped")
    frames = Frames(layout_of, Frame)
    # What is made of the mappings is made before the stop, and kept if they are the same in it.
    ahead = frames.of(process.mappings())
    _ = ahead.pieces, ahead.behind
    begin = time.perf_counter()
    until_s = time.monotonic() + options.stopped_s
    asleep_s = min(options.stopped_s, options.asleep_s)
    with stopping.stop(process, options.stop_limit_s, asleep_s) as stop:
        at_barrier("stopped")
        result.instant_ns = time.time_ns()
        mappings = process.mappings()
        frame = frames.of(mappings)
        result.layout = frame.layout
        if options.in_stop is not None:
            options.in_stop(stop, mappings, result.layout)
        pages = frame.content(process)
        writer.copy(pages, frame.pieces, "stop", until_s=until_s)
        result.stop_bytes = PageRanges(pages).bytes
        at_barrier("copied")
        process.check()
    result.pause_s = time.perf_counter() - begin
    stop.check()
    return result
