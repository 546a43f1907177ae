"""The working sets of a snapshot: files beside its own, which are hints and never content."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pyuffd import _working_set_files
from pyuffd._working_set import ID_BYTES, Place, Run, WorkingSet, pack
from pyuffd.snapshot._reading import Image

SUFFIX = ".working-set"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: object) -> str:
    """Return the name of a working set, which becomes a part of that of its file."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a working set must be a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} is no name of a working set: up to 64 letters, digits, '.', '_' and"
            " '-', the first a letter or a digit"
        )
    return name


def image_id(image: Image) -> bytes:
    """Return what its working sets are bound to."""
    return _bytes_of(image.id)


def _bytes_of(id_: str) -> bytes:
    return id_.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")


def files_for(image: Image, id_: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and content of its working sets for a copy of the image that has another id.

    One that cannot be used is left out.
    """
    for name, known in load_all(image).items():
        if not known.problem:
            yield name + SUFFIX, pack(replace(known, image_id=_bytes_of(id_)))


def image_length(image: Image) -> int:
    """Return the size of all its regions."""
    return sum(region.length for region in image.regions)


def offset_of(image: Image, address: int) -> int:
    """Return where an address is in the image: its regions, one behind the other."""
    offset = 0
    for region in image.regions:
        if region.start <= address < region.end:
            return offset + address - region.start
        offset += region.length
    raise LookupError(f"{address:#x} was not mapped")


def load(image: Image, name: str) -> WorkingSet | None:
    """Return a working set, with a `problem` if it cannot be used; None if there is none."""
    path = os.path.join(image.path, check_name(name) + SUFFIX)
    return _working_set_files.load(path, image_id(image), image_length(image))


def load_all(image: Image) -> dict[str, WorkingSet]:
    """Return all working sets by name, in its order."""
    found = {}
    for entry in sorted(os.listdir(image.path)):
        name = entry.removesuffix(SUFFIX)
        if name == entry or not _NAME.fullmatch(name):
            continue
        if (known := load(image, name)) is not None:
            found[name] = known
    return found


def add(image: Image, name: str, recorded: Iterable[Run], filled: Iterable[Run] = ()) -> WorkingSet:
    """Add a recording to a working set, and return it."""
    path = os.path.join(image.path, check_name(name) + SUFFIX)
    return _working_set_files.add(path, image_id(image), image_length(image), recorded, filled)


def places(image: Image, memory: Sequence[tuple[int, int, int]]) -> list[list[Place]]:
    """Return where parts of memory are in the image, for each: one place for each mapping.

    Args:
        image: The image.
        memory: For each: the address in the snapshot, bytes, and the size of its pages.
    """
    found: list[list[Place]] = [[] for _ in memory]
    ends, offsets = [region.end for region in image.regions], [0]
    for region in image.regions:
        offsets.append(offsets[-1] + region.length)
    for number, (address, length, page_size) in enumerate(memory):
        at = bisect_right(ends, address)
        while at < len(ends) and image.regions[at].start < address + length:
            region = image.regions[at]
            begin, end = max(address, region.start), min(address + length, region.end)
            found[number].append(
                Place(
                    offsets[at] + begin - region.start,
                    end - begin,
                    number,
                    begin - address,
                    page_size,
                )
            )
            at += 1
    return found
