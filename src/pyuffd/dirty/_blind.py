"""What dirty tracking cannot see, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyuffd._enums import Word
from pyuffd.remote._mappings import Mapping, MappingKind


class BlindReason(Word):
    """Why changes of a range may go unseen.

    Attributes:
        SHARED: Shared memory: writes through another mapping, by another process or by write(2) on
            the file go past this page table.
        FILE: A private mapping of a file: pages that were never written here show what others write
            to the file, and a private copy that is dropped (MADV_DONTNEED) while it is on swap
            turns into the file's page unseen.
        FILE_HOLES: Pages dropped through the file (fallocate, ftruncate) turn into zeros and are
            not reported; those dropped by MADV_REMOVE are with `watch_drops`.
        HUGE_DROPS: MADV_DONTNEED of hugetlb pages loses their content and is not reported, without
            `watch_drops`.
        PINNED: Pages pinned for direct access: io_uring's fixed buffers and those of direct reads
            that are under way are written by the kernel, and vfio's or RDMA's by devices, past the
            page table. All memory, where the kernel does not list which pages are.
        NOT_REGISTERED: The kernel does not register it; `detail` has its answer.
        BUSY: Another userfaultfd has it registered.
        SPECIAL: The kernel's own pages (vdso, vvar), which it writes itself.
    """

    SHARED = "shared"
    FILE = "file"
    FILE_HOLES = "file-holes"
    HUGE_DROPS = "huge-drops"
    PINNED = "pinned"
    NOT_REGISTERED = "not-registered"
    BUSY = "busy"
    SPECIAL = "special"


@dataclass(frozen=True, slots=True, order=True)
class Blind:
    """A range in which changes may go unseen, and why.

    Attributes:
        start: First address.
        end: The address behind the last.
        reason: Why.
        detail: More about it, in a few words: the file, the kernel's answer.
    """

    start: int
    end: int
    reason: BlindReason
    detail: str = ""

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.reason.value}: {self.detail}"


def of_mapping(mapping: Mapping, *, sees_drops: bool) -> Iterator[Blind]:
    """Yield what cannot be seen of a mapping that is registered."""

    def blind(reason: BlindReason) -> Blind:
        return Blind(mapping.start, mapping.end, reason, mapping.path)

    if mapping.shared:
        yield blind(BlindReason.SHARED)
    elif mapping.has_file and mapping.kind is not MappingKind.HUGETLB:
        yield blind(BlindReason.FILE)
    if mapping.kind is MappingKind.HUGETLB and not sees_drops:
        yield blind(BlindReason.HUGE_DROPS)
    # Private memory of a memfd, too: its pages that were not written here are the file's.
    if (
        mapping.has_file and mapping.kind in (MappingKind.SHMEM, MappingKind.HUGETLB)
    ) or mapping.shared:
        yield blind(BlindReason.FILE_HOLES)
