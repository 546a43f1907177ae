"""Snapshots that tests write without a process: any content, any states, any chain."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyuffd.snapshot import _format, _sums
from pyuffd.snapshot._format import CHUNK, Runs, RunState, SnapshotRun
from tests._memory import PAGE

START = 0x7F00_0000_0000


@dataclass(frozen=True)
class Part:
    """Pages in one state; DATA has `content`."""

    pages: int
    state: RunState = RunState.DATA
    content: bytes = b""


def pattern(pages: int, seed: int = 0) -> bytes:
    """Return content in which all pages differ and none is full of zeros."""
    return b"".join(
        ((seed << 40) + number + 1).to_bytes(8, "little") * (PAGE // 8) for number in range(pages)
    )


def data(pages: int, seed: int = 0) -> Part:
    """Return a part with the content of `pattern`."""
    return Part(pages, RunState.DATA, pattern(pages, seed))


def zero(pages: int) -> Part:
    """Return a part of zeros."""
    return Part(pages, RunState.ZERO)


def write(
    path: Path,
    regions: Sequence[tuple[int, Sequence[Part]]],
    *,
    parent: Path | None = None,
    compress: bool = False,
    inode: int = 0,
) -> Path:
    """Write a snapshot of regions, each with its address and its parts, in ascending order."""
    path.mkdir(mode=0o700)
    runs: list[SnapshotRun] = []
    rows: list[dict[str, Any]] = []
    pages = bytearray()
    pack = _sums.compressor(3) if compress else None
    for start, parts in regions:
        length = PAGE * sum(part.pages for part in parts)
        place = len(pages)
        at = start
        for part in parts:
            size = part.pages * PAGE
            if part.state is not RunState.DATA:
                runs.append(SnapshotRun(at, size, part.state))
            for offset in range(0, size if part.state is RunState.DATA else 0, CHUNK):
                chunk = part.content[offset : offset + CHUNK]
                where = len(pages) if pack else place + at + offset - start
                packed = pack(chunk) if pack else chunk
                packed = packed if len(packed) < len(chunk) else chunk
                pages.extend(bytes(max(0, where + len(packed) - len(pages))))
                pages[where : where + len(packed)] = packed
                runs.append(
                    SnapshotRun(
                        at + offset,
                        len(chunk),
                        RunState.DATA,
                        where,
                        len(packed),
                        zlib.crc32(chunk),
                    )
                )
            at += size
        if not pack:
            pages.extend(bytes(place + length - len(pages)))
        rows.append(
            {
                "start": start,
                "length": length,
                "permissions": "rw-p",
                "kind": "anonymous",
                "path": "",
                "file_offset": 0,
                "device": 1 if inode else 0,
                "inode": inode,
                "page_size": PAGE,
                "places": [[start, start + length, place]],
            }
        )
    table = Runs.of(runs).pack()
    (path / "pages").write_bytes(pages)
    (path / "runs").write_bytes(table)
    manifest = {
        "format": _format.FORMAT,
        "version": _format.VERSION,
        "id": hashlib.sha256(table + bytes(str(path), "utf-8")).hexdigest()[:32],
        "parent": None,
        "depth": 0,
        "target": {"pid": 1, "name": "made", "exe": "", "arguments": [], "start_ticks": 1},
        "kernel": os.uname().release,
        "page_size": PAGE,
        "chunk_bytes": CHUNK,
        "instant": "2026-01-01T00:00:00+00:00",
        "instant_ns": 0,
        "method": "stopped",
        "reason": "made",
        "facts": {},
        "regions": rows,
        "gaps": [],
        "checksum": "crc32",
        "compression": "zstd" if compress else None,
        "pages_bytes": len(pages),
        "runs_sha256": hashlib.sha256(table).hexdigest(),
    }
    if parent is not None:
        raw = (parent / _format.MANIFEST).read_bytes()
        seen = _format.unseal(str(parent), raw)
        manifest["parent"] = {
            "id": seen["id"],
            "sha256": hashlib.sha256(raw).hexdigest(),
            "path": os.path.relpath(parent, path.parent),
        }
        manifest["depth"] = seen["depth"] + 1
    (path / _format.MANIFEST).write_bytes(_format.seal(manifest))
    return path
