"""What is to be served, as the C engine gets it: `struct uffd_range_spec` (layer L4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyuffd._rows import rows_of
from pyuffd._shim import ffi, lib
from pyuffd.handlers._types import Leaf, RangeId, RangeSpec, Taken

if TYPE_CHECKING:
    from typing_extensions import Buffer

Known = dict[int, Any]  # arrays of leaves, by the id of what they were made of

_OUTLINE_LEAVES = [
    (lib.UFFD_LEAF_MEMORY, -1, 0, 0, 0),
    (lib.UFFD_LEAF_ZERO, -1, 0, 0, 0),
]


def range_spec(given: RangeSpec, states_fd: int, taken: Taken | None) -> tuple[Any, object]:
    """Return a range's description for C, and what must be kept alive until C has read it."""
    spec = ffi.new("struct uffd_range_spec *")
    return spec, _set_spec(spec, given, states_fd, taken, {})


def range_specs(given: Sequence[RangeSpec]) -> tuple[Any, object]:
    """Return the same of many ranges, as an array."""
    specs = ffi.new("struct uffd_range_spec[]", len(given))
    known: Known = {}
    return specs, [
        _set_spec(spec, each, -1, None, known) for spec, each in zip(specs, given, strict=True)
    ]


class Served:
    """Room for what `Engine.serve_many` has done; nothing, until C has written to it."""

    def __init__(self, count: int) -> None:
        self.rows = ffi.new("struct uffd_served[]", count)

    def ranges(self, space: int, given: Sequence[RangeSpec]) -> list[RangeId]:
        """Return the ranges that are served, the first ones of those that were to be."""
        found = []
        for row, each in zip(self.rows, given, strict=True):
            if not row.id:
                break
            found.append(RangeId(space, int(row.id), each.start, each.length))
        return found

    def ioctls(self, index: int) -> int:
        """Return what the range with this index supports."""
        return int(self.rows[index].ioctls)


def _set_spec(
    spec: Any, given: RangeSpec, states_fd: int, taken: Taken | None, known: Known
) -> object:
    """Set the members of a `struct uffd_range_spec`; return what they refer to."""
    content = given.content
    spec.start = given.start
    spec.length = given.length
    spec.page_size = given.page_size
    spec.mode = given.mode
    spec.source = content.kind
    spec.source_fd = content.fd
    spec.source_address = content.address
    spec.source_offset = content.offset
    spec.source_length = content.length
    keeps: object = None
    if content.outline:
        outline = ffi.new("struct uffd_leaf_spec[]", _OUTLINE_LEAVES)
        keeps = _set_runs(spec.overlay, outline, content.outline)
        spec.overlay.is_outline = 1
    elif content.overlay is not None:
        keeps = _set_runs(
            spec.overlay, _leaves_of(content.overlay.leaves, known), content.overlay.runs
        )
    spec.local = given.local
    spec.preserve = given.preserve
    spec.writes_cache = given.writes_cache
    spec.maps_holes = given.maps_holes
    spec.shared = given.shared
    spec.states_fd = states_fd
    spec.label = _label_bytes(given.label)
    if taken is not None:
        spec.id = taken.piece.number
        spec.start = taken.piece.start
        spec.origin = taken.piece.origin
        spec.piece_length = taken.piece.end - taken.piece.start
        spec.is_left = taken.piece.is_left
        spec.states_fd = taken.states_fd
        spec.states_offset = taken.states_offset
    return keeps


def _label_bytes(label: str) -> bytes:
    """Return a label, cut to what fits in whole characters."""
    raw = label.encode(errors="backslashreplace")[: lib.UFFD_LABEL_SIZE - 1]
    return raw.decode(errors="ignore").encode()


def _leaves_of(given: tuple[Leaf, ...], known: Known) -> Any:
    """Return leaves as an array, one for all ranges that have the same object."""
    if id(given) not in known:
        rows = [(leaf.kind, leaf.fd, leaf.address, leaf.offset, leaf.around) for leaf in given]
        known[id(given)] = ffi.new("struct uffd_leaf_spec[]", rows)
    return known[id(given)]


def _set_runs(spec: Any, leaves: Any, runs: Buffer) -> object:
    """Set the members of a `struct uffd_overlay_spec`; return what they refer to."""
    spec.leaves, spec.leaf_count = leaves, len(leaves)
    spec.runs, spec.run_count = rows_of(runs, "struct uffd_run_spec")
    return leaves, runs
