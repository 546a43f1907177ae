"""Synthetic images in the format of `criu dump`, for tests without CRIU."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyuffd.criu import _records, _schema

PAGE = 4096
PARENT, LAZY, PRESENT = 1, 2, 4
ANON_PRIVATE = 0x22
REGULAR = 1 << 0 | 1 << 9
COMMON_MAGIC = 0x54564319

# start, pages, flags; a fourth element names the field of the count: "long" or "compat".
Entry = tuple[int, int, int]


def image(magic: int, records: Iterable[bytes]) -> bytes:
    """Return an image file."""
    data = struct.pack("<II", COMMON_MAGIC, magic)
    return data + b"".join(struct.pack("<I", len(one)) + one for one in records)


def message(kind: Any, **fields: object) -> bytes:
    """Return a message in protobuf's encoding."""
    encoded: bytes = kind(**fields).SerializeToString()
    return encoded


def pattern(number: int) -> bytes:
    """Return the content of a page; no two are equal, and none is zeros."""
    return ((number + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1 | 1).to_bytes(8, "little") * 512


def write_tree(folder: Path, pids: Iterable[int]) -> None:
    """Write pstree.img."""
    records = [message(_schema.PstreeEntry, pid=pid, ppid=0) for pid in pids]
    (folder / "pstree.img").write_bytes(image(_records.PSTREE_MAGIC, records))


def write_mappings(
    folder: Path, pid: int, mappings: Sequence[tuple[int, int] | tuple[int, int, int, int]]
) -> None:
    """Write mm-PID.img: mappings of start, end, and flags and status if they are unusual."""
    vmas = []
    for start, end, *rest in mappings:
        flags, status = rest or (ANON_PRIVATE, REGULAR)
        vmas.append({"start": start, "end": end, "flags": flags, "status": status})
    data = message(_schema.Mm, vmas=vmas)
    (folder / f"mm-{pid}.img").write_bytes(image(_records.MM_MAGIC, [data]))


def entry(start: int, pages: int, flags: int | None, *, long: bool = True) -> bytes:
    """Return an entry of a pagemap, as CRIU 4.2 writes it or as older ones do."""
    count = {"nr_pages": pages, "compat_nr_pages": 0} if long else {"compat_nr_pages": pages}
    more = {} if flags is None else {"flags": flags}
    return message(_schema.PagemapEntry, vaddr=start, **count, **more)


def write_pagemap(
    folder: Path, pid: int, entries: Sequence[Entry], *, long: bool = True, first_page: int = 0
) -> None:
    """Write pagemap-PID.img, and pages-PID.img where the n-th present page is pattern(n)."""
    records = [message(_schema.PagemapHead, pages_id=pid)]
    records += [entry(*one, long=long) for one in entries]
    (folder / f"pagemap-{pid}.img").write_bytes(image(_records.PAGEMAP_MAGIC, records))
    present = sum(pages for _, pages, flags in entries if flags & PRESENT)
    data = b"".join(pattern(first_page + number) for number in range(present))
    (folder / f"pages-{pid}.img").write_bytes(data)
