"""Keep a copy of memory up to date with rounds of a DirtyTracker; a failed save loses nothing."""

from __future__ import annotations

from pyuffd import DirtyRound, DirtyTracker, Region

PAGES = 256
PAGE = 4096


def save(round_: DirtyRound, region: Region, image: bytearray) -> int:
    """Copy what was written; return the number of pages."""
    for item in round_.written:
        at = item.start - region.start
        image[at : at + item.length] = region.read(at, item.length)
    return round_.written.pages()


with Region.anonymous(PAGES * PAGE) as region, DirtyTracker(region) as tracker:
    print(f"method {tracker.method}: {tracker.reason}")
    image = bytearray(region.length)
    for number in range(3):
        for page in range(number, PAGES, 64):
            region.write(page * PAGE, b"round %d" % number)
        with tracker.collect() as round_:
            print(f"round {number}: {save(round_, region, image)} pages")
            if number != 1:
                round_.commit()  # without it, as in round 1, the next round has all of it again
    print("the copy is", "right" if image == region.read() else "wrong")
    print("cannot be seen:", *tracker.blind or ["nothing"])
