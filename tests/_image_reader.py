"""A reader of snapshots, as docs/snapshots.md describes them. It shares no code with pyuffd."""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

PAGE = 4096
DATA, ZERO, PARENT, ABSENT, LOST, SHARED = range(1, 7)


class Reader:
    """A snapshot and its parents, checked when they are opened.

    Attributes:
        regions: (start, end, whether it is a mapping of a file).
    """

    def __init__(self, path: Path) -> None:
        raw = (path / "manifest.json").read_bytes()
        self.manifest: dict[str, Any] = json.loads(raw)
        seal = self.manifest["manifest_sha256"]
        assert seal == _sha256(raw.replace(seal.encode(), b"0" * 64))
        assert (self.manifest["format"], self.manifest["version"]) == ("pyuffd-snapshot", 1)
        self.regions = [
            (row["start"], row["start"] + row["length"], row["device"] != 0)
            for row in self.manifest["regions"]
        ]
        self._pages = (path / "pages").read_bytes()
        assert len(self._pages) == self.manifest["pages_bytes"]
        self._rows = self._table((path / "runs").read_bytes())
        self._starts = [row[0] for row in self._rows]
        self._chunks: dict[int, bytes] = {}
        self.parent: Reader | None = None
        if (parent := self.manifest["parent"]) is not None:
            place = path.parent / parent["path"]
            assert parent["sha256"] == _sha256((place / "manifest.json").read_bytes())
            self.parent = Reader(place)
            assert parent["id"] == self.parent.manifest["id"]

    def _table(self, raw: bytes) -> list[tuple[int, ...]]:
        assert self.manifest["runs_sha256"] == _sha256(raw)
        magic, version, size, count, nothing = struct.unpack_from("<8sIIQQ", raw)
        assert (magic, version, size, nothing) == (b"pyuffdRN", 1, 48, 0)
        rows = list(struct.iter_unpack("<6Q", raw[32:]))
        assert len(rows) == count
        places = [place for row in self.manifest["regions"] for place in row["places"]]
        reached = 0
        for start, length, state, offset, stored, checksum in rows:
            assert reached <= start
            assert length > 0
            assert not (start | length) % PAGE
            reached = start + length
            if state != DATA:
                assert (offset, stored, checksum) == (0, 0, 0)
                continue
            assert stored <= length <= self.manifest["chunk_bytes"]
            assert offset + stored <= len(self._pages)
            if self.manifest["compression"] is None:
                assert stored == length
                assert any(
                    first <= start and reached <= past and offset == place + start - first
                    for first, past, place in places
                )
        covered = sum(row[1] for row in rows)
        inside = sum(
            max(0, min(row[0] + row[1], end) - max(row[0], start))
            for start, end, _ in self.regions
            for row in rows
        )
        assert covered == inside == sum(end - start for start, end, _ in self.regions)
        return rows

    def page(self, address: int) -> bytes | int:
        """Return the content of a page, or the state (ABSENT, LOST, SHARED) if it has none."""
        has_file = next(file for start, end, file in self.regions if start <= address < end)
        found = self._page(address)
        return bytes(PAGE) if found == ABSENT and not has_file else found

    def _page(self, address: int) -> bytes | int:
        number = bisect_right(self._starts, address) - 1
        start, length, state, *_ = self._rows[number]
        assert start <= address < start + length
        if state == DATA:
            if number not in self._chunks:
                self._chunks[number] = self._chunk(number)
            return self._chunks[number][address - start : address - start + PAGE]
        if state == PARENT:
            assert self.parent is not None
            return self.parent._page(address)
        return bytes(PAGE) if state == ZERO else state

    def _chunk(self, number: int) -> bytes:
        _, length, _, offset, stored, checksum = self._rows[number]
        content = self._pages[offset : offset + stored]
        if stored < length:
            assert self.manifest["compression"] == "zstd"
            zstandard = importlib.import_module("zstandard")
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=length)
        assert len(content) == length
        if self.manifest["checksum"] == "crc32":
            assert zlib.crc32(content) == checksum
        else:
            assert self.manifest["checksum"] == "xxh3_64"
            assert importlib.import_module("xxhash").xxh3_64_intdigest(content) == checksum
        return content

    def content(self, start: int, length: int) -> tuple[bytes, dict[int, int]]:
        """Return bytes, with zeros where there is no content, and the states of those pages."""
        pages: list[bytes] = []
        gaps: dict[int, int] = {}
        for at in range(0, length, PAGE):
            found = self.page(start + at)
            if isinstance(found, int):
                gaps[at], found = found, bytes(PAGE)
            pages.append(found)
        return b"".join(pages), gaps


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
