"""`verify`: read everything and compare it with the checksums."""

from __future__ import annotations

from collections.abc import Callable

from pyuffd._errors import SnapshotFormatError
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._content import chain_of
from pyuffd.snapshot._format import RunState
from pyuffd.snapshot._reading import Image


def verify(image: Image, progress: Callable[[SnapshotProgress], None] | None) -> None:
    """Check a snapshot and its parents; see `Snapshot.verify`."""
    images = chain_of(image)
    for each in images:
        each.notes()
    data = [(each, run) for each in images for run in each.runs if run.state is RunState.DATA]
    done = SnapshotProgress("verify", 0, sum(run.length for _, run in data))
    bad: list[SnapshotFormatError] = []
    for each, run in data:
        try:
            each.check_chunk(run)
        except SnapshotFormatError as error:
            bad.append(error)
        done.bytes += run.length
        if progress is not None:
            progress(done)
    if bad:
        more = f" ({len(bad)} chunks are bad)" if len(bad) > 1 else ""
        raise SnapshotFormatError(bad[0].path, f"{bad[0].args[1]}{more}", bad[0].offset)
