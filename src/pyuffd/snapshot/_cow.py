"""Protect while the process runs, stop it briefly, and save each page before its first write."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd import _saver_calls as saver_calls
from pyuffd._abi import Feature
from pyuffd._errors import SnapshotError, StopTimeoutError, raise_errno
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE
from pyuffd._saver_calls import Saver
from pyuffd.dirty import _rows
from pyuffd.dirty._rows import DENSE_BYTES, DENSE_PART
from pyuffd.pagemap import PageRanges
from pyuffd.remote import _pinned
from pyuffd.remote import _stop as stopping
from pyuffd.remote._process import Process
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._capture import (
    Captured,
    Frame,
    Frames,
    Layout,
    Options,
    Placed,
    SnapshotProgress,
    at_barrier,
    has_no_file,
    own_content,
    pieces_of,
)
from pyuffd.snapshot._writer import Writer

NEEDED = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_UNPOPULATED
    | Feature.EVENT_REMAP
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
)
# Only ranges of memory without a file are looked for in it.
EVERYWHERE = calls.Pieces([(0, ADDRESS_LIMIT - PAGE_SIZE, 0, True)])
# Of pages that were about to be written, between the process and the file: 16 MiB.
MEMORY_PAGES = 4096
# Protecting again what was written, before the stop: until it is so few pages, or so often.
FEW_PAGES = 512
AGAIN_MOST = 4
# How often the stop is tried: a busy machine may be to blame.
ATTEMPTS = 3
SLICE_S = 0.05


def captured(process: Process, layout_of: Layout, writer: Writer, options: Options) -> Captured:
    """Write the memory of a process at one instant; see `_methods.capture`."""
    with ExitStack() as stack:
        uffd = stack.enter_context(process.attach(NEEDED))
        at_barrier("attached")
        saver = Saver(
            pid=process.memory_tid,
            uffd=uffd.fileno(),
            pagemap_fd=process.pagemap.fileno(),
            mem_fd=writer.mem_fd,
            fd=writer.fd,
            memory_pages=MEMORY_PAGES,
            max_stall_ns=int(options.max_stall_s * 1e9),
            rate=int(options.rate or 0),
        )
        cow = _Cow(process, layout_of, writer, options, saver)
        stack.callback(saver.close)
        return cow.run()


class _Cow:
    def __init__(
        self,
        process: Process,
        layout_of: Layout,
        writer: Writer,
        options: Options,
        saver: Saver,
    ) -> None:
        self._process = process
        self._pagemap = process.pagemap.fileno()
        self._writer = writer
        self._options = options
        self._saver = saver
        self._registered = ranges.NO_RANGES
        self._populated = ranges.NO_RANGES
        # Written, dropped, unmapped or moved since, and not protected again.
        self._touched = ranges.NO_RANGES
        self._frames = Frames(layout_of, _Frame)
        # What of it was not only written.
        self._changed = ranges.NO_RANGES
        # Fixed buffers of io_uring, which the kernel writes without a fault.
        self._fixed = ranges.NO_RANGES
        # Where only populated pages are protected: see `_rows.chosen_track`.
        self._sparse = ranges.NO_RANGES

    def run(self) -> Captured:
        """Arm, stop, and wait for the sweep."""
        self._arm(self._frames.of(self._process.mappings()).layout)
        at_barrier("armed")
        for _ in range(AGAIN_MOST):
            noted = self._noted()
            self._protect_again(noted)
            if PageRanges(noted).pages() <= FEW_PAGES:
                break
        self._prepare()
        result = Captured("cow")
        late: StopTimeoutError | None = None
        for _ in range(ATTEMPTS):
            try:
                if self._stop(result):
                    break
            except StopTimeoutError as error:
                if error.state != "D":
                    raise
                late = error
                time.sleep(self._options.max_stall_s)  # as long as its threads were stopped
            self._protect_again(self._noted())
        else:
            if late is not None:
                raise late
            raise SnapshotError(
                "stalled",
                f"process {self._process.pid} would be stopped for longer than max_stall_s"
                f" ({self._options.max_stall_s:g} s): it was let go after {result.pause_s:.2g} s",
            )
        at_barrier("resumed")
        self._writer.punch(result.layout)
        self._writer.write_taken(self._frames.last.pieces)
        self._sweep(result)
        return result

    # Before the stop

    def _arm(self, layout: Sequence[Placed]) -> None:
        at_barrier("arming")
        parts = [part for part in layout if _is_protected(part)]
        pieces = pieces_of(parts)
        for first in range(0, len(parts), ranges.AT_ONCE):
            few = parts[first : first + ranges.AT_ONCE]
            spans = PageRanges.of((part.start, part.end) for part in few)
            self._register((span.start, span.end) for span in spans)
        # From here on events tell what is dropped or moved.
        before = own_content(self._process, pieces)
        at_barrier("content known")
        filled = ranges.bytes_in(before, _rows.packed((part.start, part.end) for part in parts))
        dense: list[tuple[int, int]] = []
        sparse: list[tuple[int, int]] = []
        for part, size in zip(parts, filled, strict=True):
            length = part.end - part.start
            is_dense = length <= DENSE_BYTES or size * DENSE_PART >= length
            (dense if is_dense else sparse).append((part.start, part.end))
        self._sparse = _packed(sparse)
        whole = ranges.intersect(_packed(dense), self._registered)
        some = ranges.intersect(ranges.intersect(before, self._sparse), self._registered)
        failed = self._protect(ranges.union(whole, some))
        # The stop looks at these as if they were new.
        self._registered = ranges.subtract(self._registered, failed)
        # A hole was neither registered nor protected; what is mapped there later sends no event.
        now = {(m.start, m.end, m.permissions) for m in self._process.mappings()}
        same = (
            (part.start, part.end)
            for part in parts
            if (part.mapping.start, part.mapping.end, part.mapping.permissions) in now
        )
        self._registered = ranges.intersect(self._registered, _packed(same))
        # Holes have marks now, which look like pages on swap.
        after, swapped = pieces.scan_apart(self._pagemap)
        new = PageRanges(ranges.subtract(swapped, before))
        empty = _own_pages.marks(self._process, new, doubtful=True).memoryview()
        populated = ranges.union(before, ranges.subtract(after, empty))
        self._populated = ranges.intersect(populated, self._registered)

    def _register(self, spans: Iterable[tuple[int, int]]) -> None:
        """Register spans, each by one call."""
        done: list[tuple[int, int]] = []
        for start, end in spans:
            code = self._saver.arm(_packed([(start, end)]), registers=True)
            if not code:
                done.append((start, end))
            elif code in (errno.ESRCH, errno.ENOMEM):
                self._process.check()
        self._registered = ranges.union(self._registered, _packed(done))

    def _protect(self, pages: memoryview) -> memoryview:
        """Protect ranges; return those where it failed, since their mappings change meanwhile."""
        failed: list[tuple[int, int]] = []
        if len(pages) and self._saver.arm(pages, registers=False):
            self._process.check()
            for each in PageRanges(pages):
                span = (each.start, each.end)
                if self._saver.arm(_packed([span]), registers=False):
                    failed.append(span)
        return _packed(failed)

    def _noted(self) -> memoryview:
        found, changed, code = self._saver.take_noted()
        self._fail(code)
        self._touched = ranges.union(self._touched, found)
        self._changed = ranges.union(self._changed, changed)
        return found

    def _protect_again(self, noted: memoryview) -> None:
        """Protect what was written since, so that the stop has less to do."""
        look = ranges.intersect(noted, self._registered)
        written = EVERYWHERE.scan(self._pagemap, unprotected=True, within=look)
        failed = self._protect(written)
        # As if it had been protected from the beginning. Not what is being dropped: nothing tells
        # when it gets content again.
        again = ranges.subtract(ranges.subtract(written, failed), self._changed)
        self._populated = ranges.union(self._populated, again)
        self._touched = ranges.union(ranges.subtract(self._touched, again), failed)
        at_barrier("protected again")

    # The stop

    def _stop(self, result: Captured) -> bool:
        """Make this the instant; False if the process would be stopped for too long."""
        begin = time.perf_counter()
        is_made = self._stand(result)
        result.pause_s = time.perf_counter() - begin
        return is_made

    def _stand(self, result: Captured) -> bool:
        process, options = self._process, self._options
        begun_s = time.monotonic()
        until_s = begun_s + options.max_stall_s
        with stopping.stop(process, options.stop_limit_s, options.max_stall_s) as stop:
            at_barrier("stopped")
            result.instant_ns = time.time_ns()
            mappings = process.mappings()
            frame = self._frames.of(mappings)
            layout = result.layout = frame.layout
            if len(self._fixed):
                self._fixed = ranges.union(self._fixed, self._fixed_buffers())
            owed = ranges.subtract(self._owed(frame.protected), self._fixed)
            others = self._others(frame)
            if len(frame.agreed):
                until_s = begun_s + options.stopped_s
            is_taken = self._writer.take(others, frame.pieces, until_s)
            if not is_taken or time.monotonic() > until_s:
                self._writer.forget(others)
                return False
            if options.in_stop is not None:
                options.in_stop(stop, mappings, layout)
            process.check()
            self._fail(self._saver.begin(frame.protected.pieces, owed))
            result.stop_bytes = PageRanges(others).bytes
            at_barrier("saves")
        stop.check()
        return True

    def _owed(self, parts: Frame) -> memoryview:
        """Protect what is not protected yet; return all pages with content."""
        self._noted()
        old = ranges.subtract(ranges.intersect(self._registered, parts.spans), self._touched)
        # Before the next call, which protects the first page of each mapping.
        some = ranges.intersect(self._sparse, old)
        sparse = own_content(self._process, EVERYWHERE, unprotected=True, within=some)
        old = ranges.subtract(old, self._saver.unregistered(parts.rows))
        new = ranges.subtract(parts.spans, old)
        self._registered = old
        if len(new):
            sizes = ranges.bytes_in(new, parts.rows)
            self._register(
                (part.start, part.end)
                for part, size in zip(parts.layout, sizes, strict=True)
                if size
            )
        # Without protection: written since, new, or in memory of which only some was protected.
        look = ranges.intersect(new, self._registered)
        sparse = ranges.intersect(sparse, old)
        bare = EVERYWHERE.scan(self._pagemap, unprotected=True, within=look)
        failed = self._protect(ranges.union(bare, sparse))
        self._registered = ranges.subtract(self._registered, failed)
        # What was moved is protected, and in another place than before.
        content = ranges.union(own_content(self._process, EVERYWHERE, within=look), sparse)
        found = ranges.union(ranges.intersect(self._populated, old), content)
        found = ranges.subtract(found, failed)
        # All of it is protected now: if this stop is given up, the next one does not find it again.
        self._populated = found
        return found

    def _prepare(self) -> None:
        """Do what every stop begins with: raise if that and the copying would be too long."""
        limit_s = self._options.max_stall_s
        for _ in range(ATTEMPTS):
            begin = time.perf_counter()
            frame = self._frames.of(self._process.mappings())
            self._fixed = self._fixed_buffers()
            found = frame.rest.content(self._process)
            found = ranges.union(found, self._fixed_content(frame.protected.spans))
            frame.prepare()
            seconds = time.perf_counter() - begin
            size = PageRanges(ranges.subtract(found, frame.agreed)).bytes
            seconds += size / self._writer.read_speed
            if seconds <= limit_s:
                self._writer.prepare(PageRanges(found).bytes)
                self._fail(self._saver.prepare(frame.protected.pieces, self._populated))
                return
        raise SnapshotError(
            "stalled",
            f"process {self._process.pid} would be stopped for {seconds:.2g} s while its"
            f" {len(frame.layout)} mappings are examined and {size / 1e6:.0f} MB are copied that"
            f" cannot be protected, and max_stall_s is {limit_s:g} s",
        )

    def _others(self, frame: _Frame) -> memoryview:
        """Return the content that cannot be protected."""
        found = frame.rest.content(self._process)
        spans = frame.protected.spans
        refused = ranges.subtract(spans, self._registered)
        found = ranges.union(found, own_content(self._process, EVERYWHERE, within=refused))
        return ranges.union(found, self._fixed_content(spans))

    def _fixed_buffers(self) -> memoryview:
        return _packed(pin.pages for pin in _pinned.fixed_buffers(self._process.memory_tid))

    def _fixed_content(self, spans: memoryview) -> memoryview:
        fixed = ranges.intersect(spans, self._fixed)
        return own_content(self._process, EVERYWHERE, within=fixed) if len(fixed) else fixed

    # Behind it

    def _sweep(self, result: Captured) -> None:
        at_barrier("begun sweep")
        total = self._saver.stats().left
        progress = SnapshotProgress("sweep", 0, total * 4096)
        while True:
            code = self._saver.wait(SLICE_S)
            stats = self._saver.stats()
            progress.bytes = progress.total - stats.left * 4096
            if self._options.progress is not None:
                self._options.progress(progress)
            if code != errno.EAGAIN:
                break
        at_barrier("swept")
        self._fail(code)
        result.faults, result.swept = stats.faults, stats.swept
        result.longest_wait_s = stats.longest_ns / 1e9
        dropped = self._saver.ranges(saver_calls.DROPPED)
        result.dropped = dropped
        self._writer.add(
            self._saver.ranges(saver_calls.DATA),
            self._saver.ranges(saver_calls.ZERO),
            ranges.union(dropped, self._saver.ranges(saver_calls.UNREADABLE)),
        )

    def _fail(self, code: int) -> None:
        if not code:
            return
        self._process.check()
        if code == errno.ETIMEDOUT:
            raise SnapshotError(
                "stalled",
                f"a thread of process {self._process.pid} waited for longer than max_stall_s"
                f" ({self._options.max_stall_s:g} s) for a page to be saved: the protection was"
                " lifted",
            )
        raise_errno("saving pages", code)


class _Frame(Frame):
    @cached_property
    def protected(self) -> Frame:
        """The parts that can be protected."""
        return Frame([part for part in self.layout if _is_protected(part)])

    @cached_property
    def rest(self) -> Frame:
        """The others."""
        return Frame([part for part in self.layout if not _is_protected(part)])

    @cached_property
    def agreed(self) -> memoryview:
        """The pages that are copied in the stop, however long that lasts."""
        return _packed((part.start, part.end) for part in self.layout if part.whole)

    def prepare(self) -> None:
        """Make all that the stop needs."""
        parts = self.protected
        _ = self.pieces, parts.pieces, parts.rows, parts.spans, self.rest.pieces, self.agreed


def _is_protected(part: Placed) -> bool:
    return has_no_file(part.mapping) and not part.whole


def _packed(spans: Iterable[tuple[int, int]]) -> memoryview:
    return PageRanges.of(spans).memoryview()
