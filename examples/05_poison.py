"""Pages whose content cannot be read: they are poisoned, never filled with zeros.

A file is truncated while a region is served from it; one line on stderr says so. A system call that
touches a lost page fails with EFAULT, a method of Region raises PagePoisonedError, stop() raises
HandlerError, and a program that touches the page itself gets SIGBUS, so a child process does that.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pyuffd import (
    FileSource,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    Userfaultfd,
)

PAGE = 4096


@contextmanager
def half_lost() -> Iterator[Region]:
    """Serve a region of four pages from a file that then loses the last two."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"content".ljust(PAGE, b".") * 4)
        file.flush()
        with (
            FileSource(file.name) as source,
            Userfaultfd() as uffd,
            Region.anonymous(4 * PAGE) as region,
            Handler(uffd, on_error="poison") as handler,
        ):
            handler.serve(region, source)
            file.truncate(2 * PAGE)
            yield region


def send_page(region: Region, page: int) -> str:
    """Let a system call read a page of the region; return the result as text."""
    file = os.memfd_create("out")
    try:
        with region.memoryview() as view, view[page * PAGE : (page + 1) * PAGE] as part:
            return f"{os.write(file, part)} bytes written"
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(file)


def main() -> None:
    """Lose pages, and show who notices."""
    try:
        with half_lost() as region:
            for page in (0, 3):
                print(f"page {page}, by a system call: {send_page(region, page)}")
            try:
                region.read(3 * PAGE, 1)
            except PagePoisonedError as error:
                print(f"page 3, by Region.read(): {type(error).__name__}")
    except HandlerError as error:
        print(f"the handler stopped: {error}")

    for page in (0, 3):
        child = subprocess.run([sys.executable, __file__, str(page)], check=False)
        end = signal.Signals(-child.returncode).name if child.returncode < 0 else "nothing happens"
        print(f"page {page}, by a program: {end}")


def touch(page: int) -> None:
    """Touch a page; the child's part."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with half_lost() as region, region.memoryview() as view:
        view[page * PAGE]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        touch(int(sys.argv[1]))
    else:
        main()
