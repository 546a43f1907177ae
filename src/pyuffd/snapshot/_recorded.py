"""`record`: note what a program touches while it is restored, as a working set."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pyuffd._arguments import check_int, shown
from pyuffd._pages import PAGE_SIZE, RangeLike, check_aligned, check_region, page_size_of
from pyuffd._recording import Recording, Until, Watched, check_until
from pyuffd._uffd import Userfaultfd
from pyuffd._working_set import WorkingSet
from pyuffd.handlers import Handler
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._reading import Image


def record(
    image: Image,
    name: str,
    handler: Handler,
    memory: Iterable[tuple[RangeLike, int]],
    *,
    uffd: Userfaultfd | None,
    until: Until,
    stop: threading.Event | None,
) -> WorkingSet:
    """Record one; see `Snapshot.record`."""
    _working_sets.check_name(name)
    if not isinstance(handler, Handler):
        raise TypeError(f"handler must be a Handler, not {shown(handler)}")
    until = check_until(until)
    pairs = [(region, check_int("address", address, 0)) for region, address in memory]
    for region, address in pairs:
        check_region(region)
        check_aligned("address", address, PAGE_SIZE)
    parts = _working_sets.places(
        image,
        [(address, region.length, page_size_of(region)) for region, address in pairs],
    )
    for (region, address), found in zip(pairs, parts, strict=True):
        if not found:
            raise ValueError(
                f"the snapshot has nothing at [{address:#x}, {address + region.length:#x})"
            )
    space = 0 if uffd is None else handler.space_of(uffd)
    for region, _ in pairs:
        if not handler._may_log(space, region):
            raise ValueError(
                f"memory: nothing of [{region.start:#x}, {region.start + region.length:#x}) is"
                " served by this handler, so that none of its faults is logged"
            )
    recording = Recording(
        handler.take_faults,
        [
            Watched(space, region.start, region.length, tuple(found))
            for (region, _), found in zip(pairs, parts, strict=True)
        ],
        until,
    )
    recording.run(threading.Event() if stop is None else stop)
    if not len(recording):
        return _working_sets.load(image, name) or WorkingSet(
            _working_sets.image_id(image), _working_sets.image_length(image)
        )
    return _working_sets.add(image, name, recording.runs)
