"""A file as a numpy array whose pages are read when they are touched.

The faults are resolved by a C thread (the native driver), so numpy may touch the memory while it
holds the GIL.
"""

from __future__ import annotations

import tempfile

import numpy as np

from pyuffd import FileSource, Handler, PageState, Region, Userfaultfd

NUMBERS = 4_000_000
PAGE = 4096


def use(region: Region) -> None:
    """Sum slices of the array, and print the sums."""
    # An array keeps its region open, so it lives no longer than this function.
    array = np.asarray(region).view(np.int64)[:NUMBERS]
    for part in (slice(0, 1000), slice(2_000_000, 2_100_000), slice(NUMBERS - 10, NUMBERS)):
        expected = (part.start + part.stop - 1) * (part.stop - part.start) // 2
        found = int(array[part].sum())
        assert found == expected
        print(f"sum of numbers {part.start} to {part.stop - 1}: {found}")


def main() -> None:
    """Write a file, map it lazily, and print how much of it was read."""
    with tempfile.NamedTemporaryFile() as file:
        np.arange(NUMBERS, dtype=np.int64).tofile(file.name)
        size = NUMBERS * 8
        length = -(-size // PAGE) * PAGE
        with (
            FileSource(file.name) as source,
            Userfaultfd() as uffd,
            Region.anonymous(length) as region,
            Handler(uffd, prefetch=64 << 10) as handler,
        ):
            handler.serve(region, source)
            use(region)
            states = handler.page_states(region)
            loaded = len(states) - states.count(PageState.ABSENT)
            faults = handler.stats().faults["missing"]
            print(f"{loaded} of {len(states)} pages loaded by {faults} faults")


if __name__ == "__main__":
    main()
