"""Random chains of snapshots, written as docs/snapshots.md describes them, without pyuffd."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests._image_reader import ABSENT, DATA, LOST, PAGE, PARENT, SHARED, ZERO

START, APART = 0x7F00_0000_0000, 64 << 20
CHUNK = 1 << 20
SIZES, LARGE = (1, 2, 5, 40, 130, 257, 600, 1100), (512, 700, 1100, 1600)
LENGTHS = (1, 1, 1, 2, 3, 7, 30, 200, 300)
STATES = {
    False: ((DATA, 6), (ZERO, 1), (ABSENT, 2), (LOST, 0.1)),
    True: ((DATA, 3), (ABSENT, 1), (SHARED, 0.3)),
}


@dataclass(frozen=True)
class Area:
    """Mapped addresses; `has_file` if they map a file."""

    start: int
    end: int
    has_file: bool


class Images:
    """A chain of random snapshots in a folder.

    Args:
        folder: Where to write them.
        seed: The seed of the random numbers.
        packs: Whether most of them are compressed.
        large: Whether areas can be large enough for a huge page.

    Attributes:
        paths: The snapshots, the oldest first.
    """

    def __init__(self, folder: Path, seed: int, *, packs: bool, large: bool) -> None:
        self._rng = random.Random(seed)
        self._sizes = LARGE if large else SIZES
        self._packs = packs and find_spec("zstandard") is not None
        self._areas: list[Area] = []
        self._number = 0
        # Each area is of one kind, so that most snapshots have memory without gaps.
        for _ in range(self._rng.choice((1, 1, 2, 4))):
            self._add()
        self.paths: list[Path] = []
        before: list[Area] = []
        for _ in range(self._rng.choice((1, 2, 3, 5))):
            path = folder / self._rng.choice("abc") / str(len(self.paths))
            self._write(path, before)
            self.paths.append(path)
            before = list(self._areas)
            self._change()

    def _add(self) -> None:
        """Map an area, right after the last one or far from it."""
        last = self._areas[-1] if self._areas else None
        if last is not None and self._rng.random() < 0.3:
            start = last.end
        else:
            self._number += 1
            start = START + self._number * APART + self._rng.randrange(3) * PAGE
        if any(area.start <= start < area.end for area in self._areas):
            return
        size = self._rng.choice(self._sizes) * PAGE
        self._areas.append(Area(start, start + size, self._rng.random() < 0.15))

    def _change(self) -> None:
        """Unmap, cut, and map some areas."""
        rng = self._rng
        if len(self._areas) > 1 and rng.random() < 0.2:
            self._areas.pop(rng.randrange(len(self._areas)))
        if rng.random() < 0.3:
            number = rng.randrange(len(self._areas))
            area = self._areas[number]
            cut = rng.randrange((area.end - area.start) // PAGE) * PAGE
            self._areas[number] = Area(area.start, area.end - cut, area.has_file)
        if rng.random() < 0.3:
            self._add()
        self._areas.sort(key=lambda area: area.start)

    # One snapshot

    def _regions(self) -> list[Area]:
        """Split the areas into mappings, differently each time."""
        found: list[Area] = []
        for area in sorted(self._areas, key=lambda area: area.start):
            pages = range(area.start + PAGE, area.end, PAGE)
            cuts = sorted(self._rng.sample(pages, min(len(pages), self._rng.choice((0, 0, 1, 3)))))
            for start, end in zip([area.start, *cuts], [*cuts, area.end], strict=True):
                found.append(Area(start, end, area.has_file))
        return found

    def _states(self, region: Area, before: list[Area]) -> list[tuple[int, int, int]]:
        """Return runs (start, end, state); only memory that was mapped before can be unchanged."""
        runs: list[tuple[int, int, int]] = []
        at, rng = region.start, self._rng
        states, weights = zip(*STATES[region.has_file], strict=True)
        while at < region.end:
            end = min(region.end, at + rng.choice(LENGTHS) * PAGE)
            known = next(
                (b for b in before if b.start <= at < b.end and b.has_file == region.has_file), None
            )
            if known is not None and rng.random() < 0.5:
                end = min(end, known.end)
                runs.append((at, end, PARENT))
            else:
                runs.append((at, end, rng.choices(states, weights)[0]))
            at = end
        return runs

    def _content(self, pages: int) -> bytes:
        rng = self._rng
        return b"".join(
            bytes(PAGE)
            if kind < 0.15
            else rng.randbytes(16) * (PAGE // 16)
            if kind < 0.5
            else rng.randbytes(PAGE)
            for kind in (rng.random() for _ in range(pages))
        )

    def _places(self, regions: list[Area]) -> tuple[list[list[tuple[int, int, int]]], int]:
        """Return (start, end, offset) of the regions' parts, in any order, and the length."""
        rng = self._rng
        parts: list[tuple[int, int, int]] = []
        for number, region in enumerate(regions):
            cut = rng.randrange(region.start, region.end, PAGE) if rng.random() < 0.3 else None
            if cut in (None, region.start):
                parts.append((number, region.start, region.end))
            else:
                parts += [(number, region.start, cut), (number, cut, region.end)]
        if rng.random() < 0.5:
            rng.shuffle(parts)
        found: list[list[tuple[int, int, int]]] = [[] for _ in regions]
        reached = 0
        for number, start, end in parts:
            reached += rng.choice((0, 0, 1, 5)) * PAGE
            found[number].append((start, end, reached))
            reached += end - start
        for places in found:
            places.sort()
        return found, reached

    def _write(self, path: Path, before: list[Area]) -> None:
        rng = self._rng
        regions = self._regions()
        places, length = self._places(regions)
        packs = self._packs and rng.random() < 0.8
        pack = importlib.import_module("zstandard").ZstdCompressor(level=3).compress
        name = rng.choice(["crc32", "xxh3_64"] if find_spec("xxhash") else ["crc32"])
        # Bytes to which no row refers have no meaning.
        pages = bytearray(rng.randbytes(length) if rng.random() < 0.5 else length)
        if packs:
            pages = bytearray()
        rows: list[tuple[int, ...]] = []
        for region, parts in zip(regions, places, strict=True):
            for start, end, state in self._states(region, before):
                if state != DATA:
                    rows.append((start, end - start, state, 0, 0, 0))
                    continue
                for first, past, place, at in (
                    (*part, at)
                    for part in parts
                    for at in range(max(part[0], start), min(part[1], end), CHUNK)
                ):
                    until = min(past, end, at + CHUNK)
                    content = self._content((until - at) // PAGE)
                    offset, stored = place + at - first, content
                    if packs:
                        offset, stored = len(pages), min(pack(content), content, key=len)
                    pages[offset : offset + len(stored)] = stored
                    sum_ = _SUMS[name](content)
                    rows.append((at, until - at, DATA, offset, len(stored), sum_))
        self._put(path, pages, rows, regions, places, name, packs=packs)

    def _put(
        self,
        path: Path,
        pages: bytearray,
        rows: list[tuple[int, ...]],
        regions: list[Area],
        places: list[list[tuple[int, int, int]]],
        checksum: str,
        *,
        packs: bool,
    ) -> None:
        path.mkdir(mode=0o700, parents=True)
        table = struct.pack("<8sIIQQ", b"pyuffdRN", 1, 48, len(rows), 0)
        table += b"".join(struct.pack("<6Q", *row) for row in rows)
        parent: dict[str, Any] | None = None
        if self.paths:
            raw = (self.paths[-1] / "manifest.json").read_bytes()
            parent = {
                "id": json.loads(raw)["id"],
                "sha256": hashlib.sha256(raw).hexdigest(),
                "path": os.path.relpath(self.paths[-1], path.parent),
            }
        manifest = {
            "format": "pyuffd-snapshot",
            "version": 1,
            "id": self._rng.randbytes(16).hex(),
            "parent": parent,
            "depth": len(self.paths),
            "target": {"pid": 1, "name": "made", "exe": "", "arguments": [], "start_ticks": 1},
            "kernel": "6.0",
            "page_size": PAGE,
            "chunk_bytes": CHUNK,
            "instant": "2026-01-01T00:00:00+00:00",
            "instant_ns": 1767225600 * 10**9,
            "method": "stopped",
            "reason": "made",
            "facts": {},
            "regions": [
                {
                    "start": region.start,
                    "length": region.end - region.start,
                    "permissions": "rw-p",
                    "kind": "private-file" if region.has_file else "anonymous",
                    "path": "/file" if region.has_file else "",
                    "file_offset": 0,
                    "device": int(region.has_file),
                    "inode": int(region.has_file),
                    "page_size": PAGE,
                    "places": parts,
                }
                for region, parts in zip(regions, places, strict=True)
            ],
            "gaps": [],
            "checksum": checksum,
            "compression": "zstd" if packs else None,
            "pages_bytes": len(pages),
            "runs_sha256": hashlib.sha256(table).hexdigest(),
            "manifest_sha256": "0" * 64,
        }
        text = json.dumps(manifest)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (path / "manifest.json").write_text(text.replace("0" * 64, digest))
        (path / "runs").write_bytes(table)
        with open(path / "pages", "wb") as file:  # sparse
            file.truncate(len(pages))
            for at in range(0, len(pages), PAGE):
                if pages[at : at + PAGE].count(0) != len(pages[at : at + PAGE]):
                    file.seek(at)
                    file.write(pages[at : at + PAGE])


def _xxh3(data: bytes) -> int:
    digest: int = importlib.import_module("xxhash").xxh3_64_intdigest(data)
    return digest


_SUMS: dict[str, Callable[[bytes], int]] = {"crc32": zlib.crc32, "xxh3_64": _xxh3}
