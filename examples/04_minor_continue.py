"""Minor faults: pages in the page cache, which a program sees and changes before they are mapped.

The content arrives through an alias, a second mapping of the same memfd that is not registered.
The first touch of each page of the registered mapping is then a minor fault, and UFFDIO_CONTINUE
maps the page as it is: no copy. Here the fault handler turns the page into capitals first.
"""

from __future__ import annotations

import os
import select
import threading

from pyuffd import Feature, Pagefault, PagefaultFlag, Region, RegisterMode, Userfaultfd

PAGE = 4096
WORDS = [b"shared", b"memory", b"without", b"copies"]


def handle_faults(uffd: Userfaultfd, region: Region, alias: Region, stop_fd: int) -> None:
    """Change each page through the alias, then map it, until `stop_fd` becomes readable."""
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    changed = set()
    while stop_fd not in dict(poll.poll()):
        for event in uffd.read_events():
            assert isinstance(event, Pagefault)
            assert PagefaultFlag.MINOR in event.flags
            offset = (event.address - region.start) // PAGE * PAGE
            if offset not in changed:  # one access may send its event twice
                alias.write(offset, alias.read(offset, PAGE).upper())
                changed.add(offset)
            print(f"    minor fault on page {offset // PAGE}")
            uffd.fill_continue(region.start + offset, PAGE)


def main() -> None:
    """Fill a memfd through one mapping and read it through the other."""
    stop_fd = os.eventfd(0)
    with (
        Userfaultfd(features=Feature.MINOR_SHMEM) as uffd,
        Region.memfd(len(WORDS) * PAGE) as region,
        region.alias() as alias,
    ):
        for page, word in enumerate(WORDS):
            alias.write(page * PAGE, word)
        uffd.register(region, mode=RegisterMode.MINOR)
        thread = threading.Thread(
            target=handle_faults, args=(uffd, region, alias, stop_fd), name="fault handler"
        )
        thread.start()
        try:
            for page, word in enumerate(WORDS):
                found = region.read(page * PAGE, len(word))
                print(f"page {page}: {found.decode()}")
                assert found == word.upper()
        finally:
            os.eventfd_write(stop_fd, 1)
            thread.join()
    os.close(stop_fd)


if __name__ == "__main__":
    main()
