"""The inline driver: the thread that faults resolves its own fault, in a SIGBUS handler.

No other thread is woken, which makes it the fastest driver. It sees accesses of this process's
own code only: a system call that meets a missing page fails with EFAULT, so populate() comes
before memory is handed to the kernel.
"""

from __future__ import annotations

import os

from pyuffd import BufferSource, Feature, Handler, Region, Userfaultfd

PAGE = 4096
PAGES = 64
TEXT = b"The quick brown fox jumps over the lazy dog. "


def write_out(region: Region, offset: int, n: int) -> int:
    """Let write(2) read part of the region; return the bytes written."""
    file = os.memfd_create("out")
    try:
        with region.memoryview() as view, view[offset : offset + n] as part:
            return os.write(file, part)
    finally:
        os.close(file)


def main() -> None:
    """Touch memory from Python code, and from a system call."""
    content = (TEXT * (PAGES * PAGE // len(TEXT) + 1))[: PAGES * PAGE]
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd, driver="inline") as handler,
    ):
        handler.serve(region, BufferSource(content))
        with region.memoryview() as view:
            for page in (0, 10, 20):
                assert view[page * PAGE] == content[page * PAGE]  # holds the GIL, harmlessly
        fault = handler.recent_faults()[0]
        print(f"{handler.stats().faults['missing']} faults; the last in thread {fault.thread_id}")

        try:
            write_out(region, 30 * PAGE, 4 * PAGE)
        except OSError as error:
            print(f"write(2) of missing pages: {error.strerror}")
        filled = handler.populate(region, 30 * PAGE, 4 * PAGE)
        written = write_out(region, 30 * PAGE, 4 * PAGE)
        print(f"populate() filled {filled} bytes, and write(2) wrote {written}")


if __name__ == "__main__":
    main()
