"""Restores whose image changes while the background fills: cut, replaced, written over."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest

from pyuffd import (
    Feature,
    Handler,
    PagePoisonedError,
    Region,
    Snapshot,
    SnapshotFormatError,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd._image_calls import replace_untouched
from pyuffd.snapshot._content import PIECE
from pyuffd.testing import needs
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._images import START, data, write, zero
from tests._memory import PAGE

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE | Feature.POISON)
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS, MAP_FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10
PIECES, LEFT = 8, 6
RUNS, LONGEST_S = 1500, 0.02  # as many mappings, and how long it takes to make them
PAGES = PIECES * PIECE // PAGE
# (mode, verify, what happens to the image)
CASES = [
    ("copy", "no", "cut"),
    ("copy", "drain", "cut"),
    ("minor", "no", "cut"),
    ("copy", "drain", "replaced"),
    ("minor", "no", "replaced"),
    ("copy", "drain", "written over"),
    ("minor", "drain", "written over"),
]


def change(folder: Path, how: str) -> None:
    if how == "cut":
        os.truncate(folder / "pages", LEFT * PIECE)
    elif how == "replaced":
        shutil.rmtree(folder)
        write(folder, [(START, [data(PAGES, 99)])])
    else:  # the same file, from the cut on
        with open(folder / "pages", "r+b") as file:
            file.seek(LEFT * PIECE)
            file.write(b"other" * (PIECE // 5))


def changed(mode: Any, verify: Any, how: str) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = write(Path(path) / "one", [(START, [data(PAGES)])])
        good = (folder / "pages").read_bytes()
        with (
            Snapshot.open(folder) as snapshot,
            Region.anonymous(PAGES * PAGE) as region,
            # A piece each second but for the first two: it is in the middle when the image changes.
            snapshot.restore(
                {START: region}, mode=mode, verify=verify, rate=PIECE / SCALE, threads=2
            ) as restore,
        ):
            until = time.monotonic() + 20 * SCALE
            while restore.progress.bytes < 2 * PIECE:
                assert time.monotonic() < until
                time.sleep(0.001)
            restore.pause()
            assert restore.progress.bytes <= (LEFT - 2) * PIECE  # two more may be on their way
            change(folder, how)
            restore.rate = None
            restore.resume()
            if how == "replaced":
                assert restore.wait(30 * SCALE)
            else:
                with pytest.raises((UffdOSError, SnapshotFormatError)) as caught:
                    restore.wait(30 * SCALE)
                if isinstance(caught.value, SnapshotFormatError):
                    assert verify == "drain"
                    # Two threads are at these pieces; either may be first.
                    assert caught.value.offset in (LEFT * PIECE, (LEFT + 1) * PIECE)
                else:
                    assert isinstance(caught.value, UffdOSError)
                    assert (verify, caught.value.errno) == ("no", errno.ENODATA)
            for at in range(0, PAGES * PAGE, PAGE):
                if how == "replaced" or at < LEFT * PIECE:
                    assert region.read(at, PAGE) == good[at : at + PAGE], at
                elif at < (LEFT + 1) * PIECE or how == "cut":
                    with pytest.raises(PagePoisonedError):
                        region.read(at, 1)


@pytest.mark.parametrize(("mode", "verify", "how"), CASES)
def test_an_image_that_changes(mode: str, verify: str, how: str) -> None:
    run_child(changed, mode, verify, how, budget_s=30)


def touched_meanwhile(mode: Any, by_view: bool) -> None:
    """What a thread writes while the call maps is in the memory, or the call raises."""
    pages, page, tries = 2 * RUNS, 2 * RUNS - 2, 40
    parts = [part for number in range(RUNS) for part in (data(1, number), zero(1))]
    kept = 0
    with tempfile.TemporaryDirectory() as path:
        folder = write(Path(path) / "one", [(START, parts)])
        for number in range(tries):
            with Snapshot.open(folder) as snapshot, Region.anonymous(pages * PAGE) as region:
                begun = threading.Event()

                def touch(
                    region: Region = region, begun: threading.Event = begun, wait: int = number
                ) -> None:
                    begun.wait()
                    time.sleep(wait * LONGEST_S / tries)
                    if by_view:
                        with region.memoryview() as view:
                            view[page * PAGE] = 0xEE  # holds the GIL while it waits
                    else:
                        region.write(page * PAGE, b"\xee")

                thread = threading.Thread(target=touch)
                thread.start()
                begun.set()
                try:
                    with snapshot.restore({START: region}, mode=mode) as restore:
                        thread.join()
                        assert restore.wait(30)
                        want = b"\xee" + snapshot.read(START + page * PAGE + 1, PAGE - 1)
                        assert region.read(page * PAGE, PAGE) == want
                        kept += 1
                except ValueError as error:
                    if "already" not in str(error):
                        raise
                thread.join()
    assert kept


@pytest.mark.parametrize("by_view", [False, True], ids=["write", "view"])
@pytest.mark.parametrize("mode", ["map", "minor"])
def test_memory_that_is_written_while_it_is_mapped(mode: str, by_view: bool) -> None:
    run_child(touched_meanwhile, mode, by_view, budget_s=60)


PRESENT, SWAPPED = 1 << 63, 1 << 62  # bits of an entry of /proc/PID/pagemap


@pytest.mark.parametrize("bit", [0, PRESENT, SWAPPED], ids=["untouched", "present", "swapped"])
def test_where_the_page_table_cannot_be_scanned(bit: int) -> None:
    """Before Linux 6.7: a file stands for the page table, as it has no PAGEMAP_SCAN either."""
    pages, touched = 1100, 1050
    content = bytes([7]) * pages * PAGE
    with ExitStack() as stack:
        region = stack.enter_context(Region.anonymous(pages * PAGE))
        table, file = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("table", "content"))
        for fd in (table, file):
            stack.callback(os.close, fd)
        os.ftruncate(table, (region.start // PAGE + pages) * 8)
        os.pwrite(table, struct.pack("=Q", bit), (region.start // PAGE + touched) * 8)
        os.write(file, content)
        length = region.length
        found = replace_untouched(
            -1, table, [(region.start, length)], [(region.start, length, 0, file)]
        )
        assert found == (region.start if bit else None)
        assert region.read() == (bytes(length) if bit else content)


GAP = range(3, 7)  # pages of a region of 32, with zeros from 16 to 23


def restores_around_a_gap(mode: Literal["copy", "minor"], handled: str, how: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gap-") as folder, ExitStack() as open_:
        path = write(Path(folder) / "one", [(START, [data(16, 1), zero(8), data(8, 2)])])
        snapshot = open_.enter_context(Snapshot.open(path))
        options: dict[str, Any] = {}
        if handled != "its own":
            uffd = open_.enter_context(Userfaultfd(features=Feature[handled]))
            options["handler"] = open_.enter_context(Handler(uffd))
        region = open_.enter_context(Region.anonymous(32 * PAGE))
        gap, length = region.start + GAP.start * PAGE, len(GAP) * PAGE
        with snapshot.restore([(START, region)], mode=mode, paused=True, **options) as restore:
            if how == "unmapped":
                _memory.munmap(gap, length)
            _memory.mmap(length, READ_WRITE, ANONYMOUS | MAP_FIXED, address=gap)
            restore.resume()
            assert restore.wait(40)
        content = bytearray(snapshot.read(START, 32 * PAGE))
        content[GAP.start * PAGE : GAP.stop * PAGE] = bytes(length)
        assert region.read() == content
        if mode == "minor":  # its memfd lacks the pages of the gap: nobody else gets it
            with (
                Region.anonymous(32 * PAGE) as other,
                snapshot.restore([(START, other)], mode=mode) as again,
            ):
                assert again.wait(40)
                assert other.read() == snapshot.read(START, 32 * PAGE)


@pytest.mark.parametrize("how", ["unmapped", "mapped over"])
@pytest.mark.parametrize(
    ("mode", "handled"),
    [("copy", "its own"), ("minor", "its own"), ("copy", "EVENT_REMOVE"), ("copy", "EVENT_UNMAP")],
)
def test_what_lies_around_a_gap(mode: Literal["copy", "minor"], handled: str, how: str) -> None:
    """All of it is restored, whatever was unmapped or mapped over beside it meanwhile."""
    run_child(restores_around_a_gap, mode, handled, how, budget_s=60)
