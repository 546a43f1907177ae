"""A window of 64 MiB on a file of 1 GiB, by `evict`: more memory than there is, written and read.

The region is as large as the file, and served from it. Before more than the window is present the
pages that were not used for longest are evicted: what was written goes back to the file, and the
page is read from there when it is touched again.
"""

from __future__ import annotations

import os
import random
from collections import OrderedDict

from pyuffd import (
    Feature,
    FileSource,
    Handler,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
)

CHUNK = 1 << 20
LENGTH = 1 << 30
WINDOW = 64 << 20
ACCESSES = 400
FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED


class Window:
    """Memory of a file, of which no more than WINDOW bytes are present."""

    def __init__(self, handler: Handler, region: Region, fd: int) -> None:
        self.handler, self.region, self.fd = handler, region, fd
        self.present: OrderedDict[int, None] = OrderedDict()

    def use(self, offset: int) -> int:
        """Make room for the chunk of an offset, and return the offset."""
        chunk = offset // CHUNK * CHUNK
        self.present[chunk] = None
        self.present.move_to_end(chunk)
        while len(self.present) * CHUNK > WINDOW:
            oldest, _ = self.present.popitem(last=False)
            # Nothing else protects this region: pages that are CLEAN are in the file already.
            self.handler.evict(self.region, oldest, CHUNK, write_back=self.fd, written_only=True)
        return offset


def main() -> None:
    """Write numbers all over the file through the window, and read them back."""
    fd = os.memfd_create("file")
    os.ftruncate(fd, LENGTH)
    chance = random.Random(1)
    places = [chance.randrange(LENGTH // 8) * 8 for _ in range(ACCESSES)]
    with (
        FileSource(fd) as source,
        Userfaultfd(features=FEATURES) as uffd,
        Region.anonymous(LENGTH) as region,
        Handler(uffd, prefetch=64 << 10) as handler,
    ):
        handler.serve(region, source, mode=RegisterMode.MISSING | RegisterMode.WP)
        window = Window(handler, region, fd)
        for number, place in enumerate(places):
            region.write(window.use(place), number.to_bytes(8, "little"))
        absent = handler.page_states(region).count(PageState.ABSENT)
        present = LENGTH - absent * region.page_size
        last = {place: number for number, place in enumerate(places)}
        for place, number in last.items():
            assert int.from_bytes(region.read(window.use(place), 8), "little") == number
        assert present <= WINDOW
        print(f"{len(last)} numbers read back; {present >> 10} KiB were present after writing")
    os.close(fd)


if __name__ == "__main__":
    main()
