"""The pages that a restored process touched first, in order: what the next restore fills first.

The file is a hint. One of other images, or one that is damaged, costs time and never a byte: it
only says in which order pages are filled, and with what is never in it.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pyuffd._pages import PAGE_SIZE
from pyuffd.criu._images import Images, TaskImage

# Magic, version, reserved, id of the images, number of pages; then a pid and a page's number each.
_HEAD = struct.Struct("<8sII32sQ")
_MAGIC = b"pyuffdws"
_VERSION = 1
_WORDS = 2  # for each page
# 64 GiB: more is no working set.
MOST_PAGES = 1 << 24
# Pages of the image that lie between two others are filled with them: a fault costs more.
_GAP_PAGES = 4


class WorkingSet:
    """Pages in the order in which they were first touched.

    Args:
        image_id: The `Images.id` that they are of.
        pages: Tuples of a pid and a page's number (its address divided by 4096), in order.
    """

    def __init__(self, image_id: bytes, pages: Iterable[tuple[int, int]] = ()) -> None:
        self.image_id = image_id
        self._pages = dict.fromkeys(pages)

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, pid: int, addresses: Iterable[int]) -> None:
        """Add pages by address; those that are known keep their place."""
        for address in addresses:
            if len(self._pages) >= MOST_PAGES:
                return
            self._pages.setdefault((pid, address // PAGE_SIZE))

    def save(self, path: str) -> None:
        """Write it in place of the file, in one step."""
        packed = array("Q")
        for page in self._pages:
            packed.extend(page)
        head = _HEAD.pack(_MAGIC, _VERSION, 0, self.image_id, len(self._pages))
        folder, name = os.path.split(os.path.abspath(path))
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(head + packed.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str, images: Images) -> WorkingSet | None:
        """Return the set of these images in a file, or None if it has none."""
        try:
            with open(path, "rb") as file:
                head = file.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    return None
                magic, version, _, image_id, count = _HEAD.unpack(head)
                if (magic, version, image_id) != (_MAGIC, _VERSION, images.id):
                    return None
                if not 0 < count <= MOST_PAGES:
                    return None
                packed = array("Q", file.read(count * _WORDS * 8)[: count * _WORDS * 8])
        except (OSError, ValueError):
            return None
        if len(packed) != count * _WORDS:
            return None
        return cls(image_id, zip(packed[::2], packed[1::2], strict=True))

    def runs(self, task: TaskImage) -> Iterator[tuple[int, int, int]]:
        """Yield (number of a span, offset, length) of this process's pages, in order.

        Pages that are touched one after the other, or nearly so, are one run.
        """
        begin = past = -1
        for pid, page in self._pages:
            if pid != task.pid:
                continue
            if begin >= 0 and past <= page <= past + _GAP_PAGES:
                past = page + 1
                continue
            if begin >= 0:
                yield from _within(task, begin, past)
            begin, past = page, page + 1
        if begin >= 0:
            yield from _within(task, begin, past)


def _within(task: TaskImage, begin: int, past: int) -> Iterator[tuple[int, int, int]]:
    at = bisect_right(task.spans, begin * PAGE_SIZE, key=lambda span: span.start + span.length)
    for number in range(at, len(task.spans)):
        span = task.spans[number]
        first = max(begin * PAGE_SIZE, span.start)
        end = min(past * PAGE_SIZE, span.start + span.length)
        if first >= end:
            break
        yield number, first - span.start, end - first
