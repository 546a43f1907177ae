"""Overlays by themselves: what lies over what, against a model of bytes, and bad arguments."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    FileSource,
    OverlaySource,
    PageSource,
    ZeroSource,
)

SIZE = 4096


def random_overlay(rng: random.Random, size: int, depth: int = 2) -> tuple[OverlaySource, bytes]:
    """Make an overlay with gaps of zeros, and what it must contain."""
    model = bytearray(size)
    pieces: list[tuple[int, int | None, Any]] = []
    for _ in range(rng.randrange(6)):
        offset = rng.randrange(size)
        length = rng.randrange(1, size - offset + 1)
        kind = rng.randrange(4)
        if kind == 0 and depth:
            inner, data = random_overlay(rng, length, depth - 1)
            pieces.append((offset, rng.choice([None, length]), inner))
        elif kind == 1:
            data = bytes(length)
            pieces.append((offset, length, ZeroSource()))
        else:
            data = rng.randbytes(length)
            longer = rng.randrange(3)
            pieces.append((offset, None if not longer else length, data + bytes(longer)))
        model[offset : offset + length] = data
    return OverlaySource(pieces, gaps="zeros", length=size), bytes(model)


@pytest.mark.parametrize("seed", range(60))
def test_random_overlays_against_bytes(seed: int) -> None:
    rng = random.Random(seed)
    overlay, model = random_overlay(rng, rng.choice([1, 7, 100, SIZE]))
    size = len(model)
    assert overlay.length == size
    assert overlay.read(0, size) == model
    for _ in range(10):
        start = rng.randrange(size + 10)
        length = rng.randrange(size + 10)
        assert overlay.read(start, length) == model[start : start + length].ljust(length, b"\0")
    # The runs cover it, in order; two adjacent ones are not one.
    assert [run.start for run in overlay.runs[1:]] == [run.end for run in overlay.runs[:-1]]
    assert (overlay.runs[0].start, overlay.runs[-1].end) == (0, size)
    for before, after in zip(overlay.runs, overlay.runs[1:], strict=False):
        joined = before.leaf == after.leaf and before.offset + before.end - before.start
        assert joined is False or joined != after.offset


def test_adjacent_pieces_of_one_image_become_one_run() -> None:
    """A difference image has a piece for each page; C searches among the runs."""
    image = BufferSource(bytes(64 * SIZE))
    starts = range(0, 64 * SIZE, SIZE)
    assert len(OverlaySource([(at, SIZE, image) for at in starts]).runs) == 64
    whole = OverlaySource([(0, None, image)])
    assert len(OverlaySource([(0, None, whole), (0, SIZE, whole)]).runs) == 1


def test_the_later_piece_counts() -> None:
    assert OverlaySource([(0, None, b"aaaa"), (1, None, b"bb")]).read(0, 4) == b"abba"
    assert OverlaySource([(1, None, b"bb"), (0, None, b"aaaa")]).read(0, 4) == b"aaaa"


def test_one_object_given_twice_is_one_leaf() -> None:
    data = b"data"
    overlay = OverlaySource([(0, None, data), (4, None, data)])
    assert len(overlay.leaves) == 1
    assert overlay.read(0, 8) == b"datadata"


def test_a_buffer_is_read_when_asked() -> None:
    data = bytearray(b"old")
    overlay = OverlaySource([(0, None, data)])
    data[:] = b"new"
    assert overlay.read(0, 3) == b"new"


def test_what_stands_for_a_source(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"file")
    with open(path, "rb") as file:
        overlay = OverlaySource(
            [
                (0, None, path),
                (4, None, str(path)),
                (8, None, file),
                (12, 4, lambda offset, length: b"function".ljust(SIZE)[offset : offset + length]),
            ]
        )
    assert overlay.read(0, 16) == b"filefilefilefunc"
    assert overlay.calls_python
    assert not OverlaySource([(0, None, path), (9, 1, b"x")], gaps="zeros").calls_python


def test_length() -> None:
    assert OverlaySource([(5, None, b"abc")], gaps="zeros").length == 8
    assert OverlaySource([(0, None, b"abc")], gaps="zeros", length=9).read(0, 9) == b"abc" + bytes(
        6
    )
    assert OverlaySource([], gaps="zeros", length=3).read(0, 3) == bytes(3)


def test_a_function_is_asked_for_whole_pages() -> None:
    asked = []

    def function(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return bytes(range(251)) * (length // 251 + 1)

    overlay = OverlaySource(
        [(10, 3 * SIZE, lambda *span: function(*span)[: span[1]])], gaps="zeros"
    )
    assert overlay.read(10 + SIZE - 1, 2) == bytes([(SIZE - 1) % 251, SIZE % 251])
    assert asked == [(0, 2 * SIZE)]


def test_a_leaf_that_returns_too_little() -> None:
    overlay = OverlaySource([(0, 4, CallableSource(lambda offset, length: b"ab"))])
    with pytest.raises(ValueError, match="0x2 bytes for 0x1000"):
        overlay.read(0, 4)


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "without pieces"),
    ([], {"length": 5}, ValueError, "from 0x0 to 0x5"),
    ([(4, None, b"x")], {}, ValueError, "from 0x0 to 0x4"),
    ([(0, None, b"x"), (3, None, b"x")], {}, ValueError, "from 0x1 to 0x3"),
    ([(0, None, b"x")], {"length": 9}, ValueError, "from 0x1 to 0x9"),
    ([(0, None, b"xxx")], {"length": 2, "gaps": "zeros"}, ValueError, "end at 0x3"),
    ([(0, None, b"x")], {"length": 0}, ValueError, "above zero"),
    ([(0, None, b"x")], {"length": 1.5}, TypeError, "length"),
    ([(0, None, b"x")], {"gaps": "maybe"}, ValueError, "maybe"),
    ([(0, 2, b"x")], {}, ValueError, "only 0x1"),
    ([(0, 0, b"x")], {}, ValueError, r"pieces\[0\] length 0x0"),
    ([(0, -1, b"x")], {}, ValueError, "length"),
    ([(-1, None, b"x")], {}, ValueError, "offset -0x1"),
    ([(1 << 63, None, b"x")], {}, ValueError, "offset"),
    ([(0, None, ZeroSource())], {}, ValueError, "no end"),
    ([(0, None, lambda offset, length: b"")], {}, ValueError, "no end"),
    ([(0, None, b"x"), (0, b"x")], {}, TypeError, r"pieces\[1\]"),
    ([b"x"], {}, TypeError, r"pieces\[0\]"),
    (b"x", {}, TypeError, "tuples"),
    (5, {}, TypeError, "tuples"),
    ([("0", None, b"x")], {}, TypeError, "offset"),
    ([(0, "1", b"x")], {}, TypeError, "length"),
    ([(0, None, 5)], {}, TypeError, "FileSource"),
    ([(0, None, BufferSource)], {}, TypeError, "instance"),
    ([(0, None, b"")], {}, ValueError, "empty"),
    ([(0, None, "/nonexistent")], {}, FileNotFoundError, "nonexistent"),
]


@pytest.mark.parametrize(("pieces", "options", "error", "named"), BAD)
def test_bad_arguments(
    pieces: Any, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        OverlaySource(pieces, **options)


def test_protocol(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"file")
    with FileSource(path) as source:
        overlay = OverlaySource([(0, None, source)])
        assert isinstance(overlay, PageSource)
        assert "1 runs of 1" in repr(overlay)
