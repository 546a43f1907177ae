"""What is to be served, as the C engine gets it: `struct uffd_range_spec` (layer L4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyuffd._rows import rows_of
from pyuffd._shim import ffi, lib
from pyuffd.handlers._types import RangeSpec, Taken

if TYPE_CHECKING:
    from typing_extensions import Buffer

Leaf = tuple[int, int, int, int, int]  # the members of struct uffd_leaf_spec

_OUTLINE_LEAVES: list[Leaf] = [
    (lib.UFFD_LEAF_MEMORY, -1, 0, 0, 0),
    (lib.UFFD_LEAF_ZERO, -1, 0, 0, 0),
]


def range_spec(given: RangeSpec, states_fd: int, taken: Taken | None) -> tuple[Any, object]:
    """Return a range's description for C, and what must be kept alive until C has read it."""
    content = given.content
    spec = ffi.new("struct uffd_range_spec *")
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
        keeps = _set_runs(spec.overlay, _OUTLINE_LEAVES, content.outline)
        spec.overlay.is_outline = 1
    elif content.overlay is not None:
        leaves = [
            (leaf.kind, leaf.fd, leaf.address, leaf.offset, leaf.around)
            for leaf in content.overlay.leaves
        ]
        keeps = _set_runs(spec.overlay, leaves, content.overlay.runs)
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
        spec.states_fd = taken.states_fd
        spec.states_offset = taken.states_offset
    return spec, keeps


def _label_bytes(label: str) -> bytes:
    """Return a label, cut to what fits in whole characters."""
    raw = label.encode(errors="backslashreplace")[: lib.UFFD_LABEL_SIZE - 1]
    return raw.decode(errors="ignore").encode()


def _set_runs(spec: Any, leaves: Sequence[Leaf], runs: Buffer) -> object:
    """Set the members of a `struct uffd_overlay_spec`; return what they refer to."""
    all_leaves = ffi.new("struct uffd_leaf_spec[]", leaves)
    spec.leaves, spec.leaf_count = all_leaves, len(all_leaves)
    spec.runs, spec.run_count = rows_of(runs, "struct uffd_run_spec")
    return all_leaves, runs
