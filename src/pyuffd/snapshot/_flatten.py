"""`flatten`: one snapshot without parents out of a chain of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyuffd.snapshot import _format, _sums, _working_sets
from pyuffd.snapshot._capture import Places, SnapshotProgress, at_barrier
from pyuffd.snapshot._files import NewDirectory
from pyuffd.snapshot._format import CHUNK, Runs, RunState, SnapshotRegion, SnapshotRun
from pyuffd.snapshot._layout import RESERVED_BYTES, UNIT
from pyuffd.snapshot._output import write_at
from pyuffd.snapshot._reading import Image, Part


def flatten(
    image: Image,
    path: str | os.PathLike[str],
    *,
    durable: bool,
    progress: Callable[[SnapshotProgress], None] | None,
) -> str:
    """Write the snapshot; see `Snapshot.flatten`."""
    notes = image.notes()
    with NewDirectory(path, durable=durable) as directory:
        sum_name, sum_ = _sums.best_sum()
        places = Places(for_mapping=True)
        done = SnapshotProgress("flatten", 0, sum(region.length for region in image.regions))
        runs: list[SnapshotRun] = []
        regions: list[dict[str, Any]] = []
        for region, fields in zip(image.regions, image.manifest["regions"], strict=True):
            parts = list(_cut(image.parts(region.start, region.end)))
            placed = [each for span in _spans(region, parts) for each in places.of(*span)]
            regions.append({**fields, "places": [list(each) for each in placed]})
            at = 0
            for part in parts:
                state = RunState.ABSENT if part.run is None else part.run.state
                run = SnapshotRun(part.start, part.end - part.start, state)
                if state is RunState.DATA:
                    content = image.read_part(part)
                    while placed[at][1] <= part.start:
                        at += 1
                    offset = placed[at][2] + part.start - placed[at][0]
                    with directory.named(_format.PAGES):
                        write_at(directory.pages.number, content, offset)
                    run = run._replace(offset=offset, stored=run.length, checksum=sum_(content))
                runs.append(run)
                done.bytes += run.length
                if progress is not None:
                    progress(done)
        at_barrier("captured")
        directory.sync_pages()
        packed = Runs.of(runs).pack()
        directory.write(_format.RUNS, packed)
        if notes is not None:
            directory.write(_format.NOTES, notes)
        for name, content in _working_sets.files_for(image, directory.id):
            directory.write(name, content)
        manifest = {key: value for key, value in image.manifest.items() if key != _format.SEAL}
        manifest |= {
            "id": directory.id,
            "parent": None,
            "depth": 0,
            "regions": regions,
            "checksum": sum_name,
            "compression": None,
            "pages_bytes": os.fstat(directory.pages.number).st_size,
            "runs_sha256": hashlib.sha256(packed).hexdigest(),
        }
        directory.write(_format.MANIFEST, _format.seal(manifest))
        at_barrier("written")
        directory.settle(progress)
        return directory.id


def _spans(region: SnapshotRegion, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Yield what gets a place in the file: of large reservations only what has content."""
    if region.length <= RESERVED_BYTES:
        yield region.start, region.end
        return
    units = {
        part.start // UNIT
        for part in parts
        if part.run is not None and part.run.state is RunState.DATA
    }
    for unit in sorted(units):
        yield max(unit * UNIT, region.start), min((unit + 1) * UNIT, region.end)


def _cut(parts: Iterator[Part]) -> Iterator[Part]:
    """Cut data at multiples of the size of a chunk; other states stay whole."""
    for part in parts:
        if part.run is None or part.run.state is not RunState.DATA:
            yield part
            continue
        at = part.start
        while at < part.end:
            stop = min(part.end, (at // CHUNK + 1) * CHUNK)
            yield part._replace(start=at, end=stop)
            at = stop
