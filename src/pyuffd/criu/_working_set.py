"""The working set of a process tree: the image is what is lazy of its processes, in order."""

from __future__ import annotations

from pyuffd._working_set import Place
from pyuffd.criu._images import Images

# Pages of the image that lie between two others are filled with them: a fault costs more.
GAP = 4 * 4096


def places_of(images: Images) -> dict[int, list[Place]]:
    """Return where the spans of each process are in the image; spans are numbered in it."""
    found: dict[int, list[Place]] = {}
    offset = number = 0
    for pid, task in images.tasks.items():
        found[pid] = []
        for span in task.spans:
            found[pid].append(Place(offset, span.length, number))
            offset, number = offset + span.length, number + 1
    return found


def length_of(images: Images) -> int:
    """Return the size of the image in bytes."""
    return sum(span.length for task in images.tasks.values() for span in task.spans)
