"""Restores from disks that fail while they are read: a page is right or lost, and never zeros."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, HandlerError, PagePoisonedError, Region, Snapshot, WorkingSet
from pyuffd._working_set import merged
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._content import PIECE
from pyuffd.testing import needs, needs_privilege
from tests._child import run_child
from tests._images import START, data, write
from tests._memory import PAGE
from tests.kernel._failing_disk import failing_disk
from tests.process._hung_files import FUSE

pytestmark = [
    needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE | Feature.POISON),
    needs_privilege("CAP_SYS_ADMIN"),
    pytest.mark.skipif(not Path(FUSE).exists(), reason="this kernel has no FUSE"),
]
PAGES = 3 * PIECE // PAGE
BAD = PIECE // PAGE + 37  # a page in the middle of the second chunk
# (mode, verify, what happens to the page first)
CASES = [
    ("copy", "no", "drain"),
    ("copy", "no", "fault"),
    ("copy", "no", "working set"),
    ("copy", "drain", "drain"),
    ("copy", "drain", "fault"),
    ("minor", "no", "drain"),
    ("minor", "no", "fault"),
    ("minor", "drain", "working set"),
]


def unreadable(mode: Any, verify: Any, first: str) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = write(Path(path) / "one", [(START, [data(PAGES)])])
        good = (folder / "pages").read_bytes()
        bad = range(BAD * PAGE, (BAD + 1) * PAGE)
        with failing_disk(folder, "pages", bad) as failing, Snapshot.open(failing) as snapshot:
            restored(snapshot, good, mode, verify, first)


def restored(snapshot: Snapshot, good: bytes, mode: Any, verify: Any, first: str) -> None:
    image = snapshot._image
    hot = merged(
        WorkingSet(_working_sets.image_id(image), _working_sets.image_length(image)),
        [(page, 1) for page in (BAD + 9, BAD, 3, PAGES - 1)],
    )
    with Region.anonymous(PAGES * PAGE) as region:
        restore = snapshot.restore(
            {START: region},
            mode=mode,
            verify=verify,
            working_set=hot if first == "working set" else None,
            paused=True,
        )
        with restore:
            if first == "fault":
                with pytest.raises(PagePoisonedError):
                    region.read(BAD * PAGE, 1)
                assert region.read((BAD + 1) * PAGE, PAGE) == good[(BAD + 1) * PAGE :][:PAGE]
            restore.resume()
            with pytest.raises((OSError, HandlerError)) as caught:
                restore.wait(30)
            is_of_handler = isinstance(caught.value, HandlerError)
            assert is_of_handler == (first == "fault" and verify == "no")
            error: Any = caught.value.__cause__ if is_of_handler else caught.value
            # UFFDIO_COPY says that memory cannot be read; read(2) says why.
            assert error.errno in ((errno.EIO,) if verify == "drain" else (errno.EFAULT, errno.EIO))
            if first == "working set":
                assert restore.wait_hot(30)
                assert restore.stats.hot_bytes == 3 * PAGE
            assert not restore.done
        lost = 0
        for page in range(PAGES):
            want = good[page * PAGE : (page + 1) * PAGE]
            try:
                found = region.read(page * PAGE, PAGE)
            except PagePoisonedError:
                lost += 1
                # A chunk that cannot be compared, or a piece that cannot be filled, is lost.
                assert PIECE <= page * PAGE < 2 * PIECE, page
            else:
                assert found == want, page
                assert page != BAD
        assert 1 <= lost <= PIECE // PAGE


@pytest.mark.parametrize(("mode", "verify", "first"), CASES)
def test_a_page_that_cannot_be_read(mode: str, verify: str, first: str) -> None:
    run_child(unreadable, mode, verify, first, budget_s=30)


def checked_first() -> None:
    """With verify="first" nothing begins: the error is that of reading, and the memory is free."""
    with tempfile.TemporaryDirectory() as path:
        folder = write(Path(path) / "one", [(START, [data(PAGES)])])
        bad = range(BAD * PAGE, (BAD + 1) * PAGE)
        with (
            failing_disk(folder, "pages", bad) as failing,
            Snapshot.open(failing) as snapshot,
            Region.anonymous(PAGES * PAGE) as region,
        ):
            with pytest.raises(OSError) as caught:
                snapshot.restore({START: region}, mode="copy", verify="first")
            assert caught.value.errno == errno.EIO
            # It was never touched: parts that can be read are restored into it.
            with snapshot.restore({START: region[:PIECE]}, mode="copy", verify="first") as restore:
                assert restore.wait(30)
            assert region.read(0, PIECE) == (folder / "pages").read_bytes()[:PIECE]


def test_a_page_that_cannot_be_checked_first() -> None:
    run_child(checked_first, budget_s=30)
