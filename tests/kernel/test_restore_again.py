"""`Snapshot.restore` into memory that was restored already: refused, and its content stays."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from pyuffd import Feature, Handler, Region, Snapshot, UffdOSError, Userfaultfd, ZeroSource
from pyuffd.regions import RegionKind
from pyuffd.testing import needs
from tests._images import START, data, write, zero
from tests._memory import PAGE

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
Mode = Literal["auto", "copy", "minor", "map"]
SECOND: tuple[Mode, ...] = ("auto", "copy", "minor", "map")
PAGES = 32
# Which pages of the region the second restore gets.
WHERE = {"same": (0, PAGES), "part": (4, 8), "over": (PAGES - 8, PAGES + 8)}
REFUSED = "which would be lost: restore into"


@contextlib.contextmanager
def two() -> Iterator[tuple[Snapshot, Snapshot]]:
    """Two snapshots of one place, with other content."""
    with tempfile.TemporaryDirectory(prefix="restore-") as path:
        old = write(Path(path) / "old", [(START, [data(16, 1), zero(8), data(8, 2)])])
        new = write(Path(path) / "new", [(START, [data(PAGES, 3)])])
        with Snapshot.open(old) as first, Snapshot.open(new) as second:
            yield first, second


def restored(snapshot: Snapshot, region: Region, mode: Mode) -> None:
    with snapshot.restore([(START, region)], mode=mode) as restore:
        assert restore.wait(10)


def test_a_complete_memfd_is_sealed() -> None:
    """Nothing can write to what later restores map."""
    with two() as (old, _), Region.anonymous(PAGES * PAGE) as region:
        restored(old, region, "minor")
        (share,) = old._all_shares._known.values()  # type: ignore[union-attr]
        assert share._sealed is not None
        assert fcntl.fcntl(share._sealed.number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE


# After "complete", no page of the memory was touched: its memfd has everything.
@pytest.mark.parametrize("first", ["copy", "minor", "complete", "map"])
def test_restored_twice(first: str) -> None:
    with two() as (old, new), Region.anonymous(2 * PAGES * PAGE) as memory:
        region = memory[: PAGES * PAGE]
        mode: Mode = "minor" if first == "complete" else first  # type: ignore[assignment]
        if first == "complete":
            with Region.anonymous(PAGES * PAGE) as other:
                restored(old, other, mode)
        restored(old, region, mode)
        for second in SECOND:
            for begin, end in WHERE.values():
                with pytest.raises(ValueError, match=REFUSED):
                    new.restore([(START, memory[begin * PAGE : end * PAGE])], mode=second)
        assert region.read() == old.read(START, PAGES * PAGE)
        # The rest of the memory was not touched.
        restored(new, memory[PAGES * PAGE :], "map")
        assert memory.read(PAGES * PAGE) == new.read(START, PAGES * PAGE)


@pytest.mark.parametrize("mode", ["minor", "map"])
def test_served_where_a_file_was_mapped(mode: Mode) -> None:
    """What the first restore has mapped there is never taken for the content of the second."""
    with (
        two() as (old, _),
        Region.anonymous(PAGES * PAGE) as region,
        Region.anonymous(PAGES * PAGE) as other,
        Userfaultfd() as uffd,
    ):
        restored(old, other, mode)
        kinds = [region.kind]
        restored(old, region, mode)
        assert [*kinds, region.kind] == [RegionKind.ANONYMOUS, RegionKind.ADDRESS]
        with Handler(uffd) as handler, pytest.raises((ValueError, UffdOSError), match="file"):
            handler.serve(region, ZeroSource())
        assert region.read() == old.read(START, PAGES * PAGE)


def test_what_a_handler_has_there_stays() -> None:
    """A restore that fails since its handler serves a region already leaves that as it is."""
    with (
        two() as (snapshot, _),
        Region.anonymous(4 * PAGE) as region,
        Region.anonymous(4 * PAGE) as own,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
    ):
        handler.serve(own, b"own." * PAGE)
        pairs = [(START, region), (START + 4 * PAGE, own)]
        with pytest.raises(ValueError, match="served already"):
            snapshot.restore(pairs, mode="copy", handler=handler)
        assert own.read(0, 4) == b"own."
        assert not uffd._has_registered(region.start, region.start + region.length)
