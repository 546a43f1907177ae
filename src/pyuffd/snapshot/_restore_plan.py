"""What a restore does: which memory gets what, and by which method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from pyuffd._arguments import check_int, shown
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE, RangeLike, check_region
from pyuffd.regions import Region
from pyuffd.snapshot import _restore_map as maps
from pyuffd.snapshot._content import Files, Placed, chain_of
from pyuffd.snapshot._format import SnapshotRegion
from pyuffd.snapshot._reading import Image
from pyuffd.snapshot._restore_options import Options, UsedMode
from pyuffd.snapshot._share import Shares

Where = SnapshotRegion | int
Regions = (
    Mapping[int, RangeLike] | Mapping[SnapshotRegion, RangeLike] | Iterable[tuple[Where, RangeLike]]
)


def place(image: Image, regions: Regions) -> list[Placed]:
    """Return regions with their content, checked."""
    pairs: object = regions.items() if isinstance(regions, Mapping) else regions
    if not isinstance(pairs, Iterable):
        raise TypeError(
            "regions must be a mapping of addresses to regions, or pairs (address, region), not"
            f" {shown(pairs)}"
        )
    images = chain_of(image)
    found: list[Placed] = []
    for number, pair in enumerate(pairs):
        name = f"regions[{number}]"
        given: object = pair
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError(f"{name} must be a pair (address, region), not {shown(given)}")
        where, region = given
        start = where.start if isinstance(where, SnapshotRegion) else where
        check_int(f"{name} address", start, 0, ADDRESS_LIMIT)
        check_region(region, name)
        if start % PAGE_SIZE:
            raise ValueError(f"{name}: address {start:#x} is not a multiple of {PAGE_SIZE:#x}")
        if start + region.length > ADDRESS_LIMIT:
            raise ValueError(f"{name}: {start:#x} + {region.length:#x} is no memory of a process")
        found.append(Placed(images, start, region))
    if not found:
        raise ValueError("regions: nothing to restore")
    spans = sorted((each.region.start, each.region.length) for each in found)
    for (start, length), (other, _) in pairwise(spans):
        if start + length > other:
            raise ValueError(f"regions overlap at {other:#x}")
    return found


def check_not_restored(placed: Sequence[Placed]) -> None:
    """Raise ValueError for memory where an earlier restore has mapped a file."""
    for each in placed:
        # A page of a file that is mapped there causes no fault that is seen, or cannot be served.
        if isinstance(each.region, Region) and each.region._is_replaced:
            raise ValueError(
                f"the region at {each.region.start:#x} has what an earlier restore has mapped"
                " there, which would be lost: restore into a new Region"
            )


def check_empty(placed: Sequence[Placed]) -> None:
    from pyuffd.handlers._present import first_touched

    touched = first_touched([each.region for each in placed])
    if touched is not None:
        raise ValueError(maps.has_pages(touched.start))


def choose(placed: Sequence[Placed], files: Files, options: Options) -> tuple[UsedMode, str]:
    if options.mode in ("copy", "minor"):
        if options.mode == "minor":
            Shares.check(placed, poisons=options.gaps == "poison")
        return options.mode, "asked for"
    if options.mode == "auto" and options.record is not None:
        return "copy", "faults are recorded, and mappings have none"
    cannot = maps.why_impossible(
        placed, has_handler=options.handler is not None, poisons=options.gaps == "poison"
    )
    if options.mode == "map":
        if cannot is not None:
            raise ValueError(f"mode='map': {cannot}")
        return "map", "asked for"
    reason = cannot or maps.why_slower(placed, files)
    if reason is None:
        return "map", "the image is here and in the page cache, so mapping it is the fastest way"
    return "copy", f"mapping the image is not the better way: {reason}"
