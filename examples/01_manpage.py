"""The demonstration of userfaultfd(2): a thread fills each page with a letter when it is touched.

The fault-handling thread is a Python thread here, so the main thread must not hold the GIL while
it faults. `Region.read` does not; indexing a memoryview or an array would, and never return.
`pyuffd.Handler`, which most other examples use, has no such rule: it needs no Python.
"""

from __future__ import annotations

import os
import select
import threading

from pyuffd import Pagefault, Region, Userfaultfd

PAGES = 3
STEP = 1024


def handle_faults(uffd: Userfaultfd, page_size: int, stop_fd: int) -> None:
    """Resolve faults until `stop_fd` becomes readable."""
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    letter = ord("A")
    while stop_fd not in dict(poll.poll()):
        for event in uffd.read_events():
            assert isinstance(event, Pagefault)  # no other event was asked for
            page = event.address - event.address % page_size
            # Not copy(): one access may send its event twice, and fill_copy() accepts a page that
            # is present already, and wakes the threads that wait for it.
            print(f"    fault at {event.address:#x}, {event.flags!r}: filled with {letter:c}")
            if uffd.fill_copy(page, bytes([letter]) * page_size).done:
                letter += 1


def main() -> None:
    """Read a byte of every kilobyte of a region, and print it."""
    stop_fd = os.eventfd(0)
    with Userfaultfd() as uffd, Region.anonymous(PAGES * 4096) as region:
        uffd.register(region)
        thread = threading.Thread(
            target=handle_faults, args=(uffd, region.page_size, stop_fd), name="fault handler"
        )
        thread.start()
        try:
            for offset in range(0xF, region.length, STEP):
                letter = region.read(offset, 1).decode()
                print(f"read {region.start + offset:#x}: {letter}")
        finally:
            os.eventfd_write(stop_fd, 1)
            thread.join()
    os.close(stop_fd)


if __name__ == "__main__":
    main()
