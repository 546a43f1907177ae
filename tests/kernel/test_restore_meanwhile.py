"""Restores whose image changes while the background fills: cut, replaced, written over."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, PagePoisonedError, Region, Snapshot, SnapshotFormatError, UffdOSError
from pyuffd.snapshot._content import PIECE
from pyuffd.testing import needs
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._images import START, data, write
from tests._memory import PAGE

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE | Feature.POISON)
PIECES, LEFT = 8, 6
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
