"""The files of private mappings, in a process that changes its mappings meanwhile."""

from __future__ import annotations

import mmap
import os

from pyuffd import Process, Region, _memory
from pyuffd.snapshot._private_files import PrivateFiles
from tests._child import run_child
from tests._memory import PAGE

FIXED = mmap.MAP_PRIVATE | 0x10
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def replaced() -> None:
    with Region.anonymous(2 * PAGE) as region, Process(os.getpid()) as process:
        first, second = (os.memfd_create(name) for name in ("first", "second"))
        for fd in (first, second):
            os.write(fd, b"content" * PAGE)
        _memory.mmap(2 * PAGE, READ_WRITE, FIXED, first, address=region.start)
        mappings = process.mappings()
        known = mappings.at(region.start)
        assert known is not None
        _memory.mmap(2 * PAGE, READ_WRITE, FIXED, second, address=region.start)
        with PrivateFiles(process, everything=False) as files:
            assert not files.add(known, mappings)
            files.begin()
            mappings = process.mappings()
            now = mappings.at(region.start)
            assert now is not None
            assert files.add(now, mappings)
            _memory.mmap(2 * PAGE, READ_WRITE, FIXED, first, address=region.start)
            files.begin()
            assert files.add(known, process.mappings())
            assert list(files.extents(known)) == [(known.start, known.end)]


def test_a_mapping_that_was_replaced_since_it_was_read() -> None:
    """/proc/PID/map_files names a range, and shows the file that is mapped there now."""
    run_child(replaced)
