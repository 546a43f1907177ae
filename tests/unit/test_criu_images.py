"""CRIU's images are read, and checked, without CRIU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")

from pyuffd import CriuError
from pyuffd._working_set import ID_BYTES
from pyuffd.criu import Images, _records, _schema
from pyuffd.criu._content import SLICE, Files, slices, source_of
from pyuffd.criu._images import LazySpan
from pyuffd.criu._pagemaps import Run
from pyuffd.criu._working_set import length_of, places_of
from tests.criu._images import (
    LAZY,
    PAGE,
    PARENT,
    PRESENT,
    entry,
    image,
    message,
    pattern,
    write_mappings,
    write_pagemap,
    write_tree,
)

BASE = 0x7F0000000000
LAZY_PRESENT = LAZY | PRESENT


def tree(folder: Path) -> Path:
    """Write images of a process with two mappings and a zombie."""
    write_tree(folder, [10, 11])
    write_mappings(folder, 10, [(BASE, BASE + 16 * PAGE), (BASE + (1 << 20), BASE + (2 << 20))])
    write_pagemap(
        folder,
        10,
        [
            (BASE + PAGE, 2, LAZY_PRESENT),
            (BASE + 5 * PAGE, 1, PRESENT),
            (BASE + 6 * PAGE, 3, LAZY_PRESENT),
            (BASE + (1 << 20), 1, LAZY_PRESENT),
        ],
    )
    return folder


def test_reads_a_tree(tmp_path: Path) -> None:
    images = Images(tree(tmp_path))
    assert {pid: task.is_zombie for pid, task in images.tasks.items()} == {10: False, 11: True}
    first, second = images.tasks[10].spans
    pages = str(tmp_path / "pages-10.img")
    assert (first.start, first.length) == (BASE, 16 * PAGE)
    assert list(first.runs) == [
        Run(BASE + PAGE, BASE + 3 * PAGE, pages, 0),
        Run(BASE + 5 * PAGE, BASE + 9 * PAGE, pages, 2 * PAGE),
    ]
    assert list(second.runs) == [Run(BASE + (1 << 20), BASE + (1 << 20) + PAGE, pages, 6 * PAGE)]
    assert images.content_bytes == 7 * PAGE
    assert images.has_long_counts


def test_counts_as_older_versions_write_them(tmp_path: Path) -> None:
    tree(tmp_path)
    new = Images(tmp_path)
    write_pagemap(tmp_path, 10, [(BASE, 3, LAZY_PRESENT)], long=False)
    old = Images(tmp_path)
    assert (old.content_bytes, old.has_long_counts) == (3 * PAGE, False)
    assert old.id != new.id


def test_an_entry_without_flags_is_present(tmp_path: Path) -> None:
    tree(tmp_path)
    head = message(_schema.PagemapHead, pages_id=10)
    data = [head, entry(BASE, 2, None, long=False)]
    (tmp_path / "pagemap-10.img").write_bytes(image(_records.PAGEMAP_MAGIC, data))
    assert Images(tmp_path).content_bytes == 2 * PAGE


def test_content_of_a_span(tmp_path: Path) -> None:
    images = Images(tree(tmp_path))
    files = Files()
    source = source_of(images.tasks[10].spans[0], files, None)
    expected = b"".join(
        pattern(number) if number is not None else bytes(PAGE)
        for number in (None, 0, 1, None, None, 2, 3, 4, 5, *[None] * 7)
    )
    assert bytes(source.read(0, 16 * PAGE)) == expected  # type: ignore[arg-type]
    files.close()


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (0x01, 1),
        (0x21, 1),
        (0x02, 1),
        (0x2022, 1),
        (0x40022, 1),
        *((0x22, 1 << n) for n in (2, 3, 12)),
    ],
)
def test_memory_that_is_never_lazy(tmp_path: Path, flags: int, status: int) -> None:
    tree(tmp_path)
    write_mappings(
        tmp_path, 10, [(BASE, BASE + PAGE), (BASE + PAGE, BASE + 2 * PAGE, flags, status)]
    )
    (span,) = Images(tmp_path).tasks[10].spans
    assert (span.start, span.length) == (BASE, PAGE)


def test_adjacent_mappings_are_one_span(tmp_path: Path) -> None:
    tree(tmp_path)
    write_mappings(tmp_path, 10, [(BASE + n * PAGE, BASE + (n + 1) * PAGE) for n in (0, 1, 2, 4)])
    spans = Images(tmp_path).tasks[10].spans
    assert [(span.start - BASE, span.length) for span in spans] == [(0, 3 * PAGE), (4 * PAGE, PAGE)]


def with_parents(folder: Path, below: list[tuple[int, int, int]]) -> Path:
    """Write an image whose pages 1 and 2 are in its parent."""
    parent = folder / "first"
    parent.mkdir()
    tree(folder)
    tree(parent)
    write_pagemap(parent, 10, below, first_page=100)
    write_pagemap(folder, 10, [(BASE, 1, LAZY_PRESENT), (BASE + PAGE, 2, LAZY | PARENT)])
    (folder / "parent").symlink_to("first")
    return folder


def test_pages_of_a_parent(tmp_path: Path) -> None:
    folder = with_parents(tmp_path, [(BASE, 2, LAZY_PRESENT), (BASE + 2 * PAGE, 3, LAZY_PRESENT)])
    files = Files()
    source = source_of(Images(folder).tasks[10].spans[0], files, None)
    data = bytes(source.read(0, 4 * PAGE))  # type: ignore[arg-type]
    assert data == pattern(0) + pattern(101) + pattern(102) + bytes(PAGE)
    files.close()


@pytest.mark.parametrize(
    "below",
    [[], [(BASE, 2, LAZY_PRESENT)], [(BASE + 2 * PAGE, 9, LAZY_PRESENT)], [(BASE, 9, LAZY)]],
    ids=["nothing", "the first only", "the second only", "left to a page server"],
)
def test_pages_that_the_parent_lacks(tmp_path: Path, below: list[tuple[int, int, int]]) -> None:
    with pytest.raises(CriuError):
        Images(with_parents(tmp_path, below))


def test_a_circle_of_parents(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "parent").symlink_to(".")
    with pytest.raises(CriuError, match="circle"):
        Images(tmp_path)


def test_pages_of_a_page_server(tmp_path: Path) -> None:
    tree(tmp_path)
    write_pagemap(tmp_path, 10, [(BASE, 2, LAZY), (BASE + 4 * PAGE, 1, PRESENT)])
    span = Images(tmp_path, is_remote=True).tasks[10].spans[0]
    pages = str(tmp_path / "pages-10.img")
    assert list(span.runs) == [
        Run(BASE, BASE + 2 * PAGE, None, BASE),
        Run(BASE + 4 * PAGE, BASE + 5 * PAGE, pages, 0),
    ]
    with pytest.raises(ValueError, match="page server"):
        source_of(Images(tmp_path).tasks[10].spans[0], Files(), None)


def _pagemap(*records: bytes) -> Callable[[Path], object]:
    data = image(_records.PAGEMAP_MAGIC, [message(_schema.PagemapHead, pages_id=10), *records])
    return lambda folder: (folder / "pagemap-10.img").write_bytes(data)


def _file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _mappings(*mappings: tuple[int, int]) -> Callable[[Path], object]:
    return lambda folder: write_mappings(folder, 10, mappings)


BAD = {
    "no magic": _file("pstree.img", b""),
    "another magic": _file("pstree.img", image(_records.MM_MAGIC, [])),
    "no processes": lambda folder: write_tree(folder, []),
    "pid 0": lambda folder: write_tree(folder, [0]),
    "pid too large": lambda folder: write_tree(folder, [1 << 30]),
    "pid twice": lambda folder: write_tree(folder, [10, 10]),
    "a record that is cut": _file("mm-10.img", image(_records.MM_MAGIC, [b"x" * 100])[:-1]),
    "a length that is cut": _file("mm-10.img", image(_records.MM_MAGIC, []) + b"\1"),
    "a huge record": _file("mm-10.img", image(_records.MM_MAGIC, []) + b"\xff\xff\xff\xff"),
    "no protobuf": _file("mm-10.img", image(_records.MM_MAGIC, [b"\xff" * 40])),
    "no mappings' record": _file("mm-10.img", image(_records.MM_MAGIC, [])),
    "two mappings' records": _file("mm-10.img", image(_records.MM_MAGIC, [b"", b""])),
    "an empty mapping": _mappings((BASE, BASE)),
    "a mapping back to front": _mappings((BASE + PAGE, BASE)),
    "an unaligned mapping": _mappings((BASE, BASE + 1)),
    "mappings that overlap": _mappings((BASE, BASE + 2 * PAGE), (BASE + PAGE, BASE + 3 * PAGE)),
    "mappings out of order": _mappings((BASE + PAGE, BASE + 2 * PAGE), (BASE, BASE + PAGE)),
    "no head": _file("pagemap-10.img", image(_records.PAGEMAP_MAGIC, [])),
    "no pages in an entry": _pagemap(entry(BASE, 0, LAZY_PRESENT)),
    "an unaligned page": _pagemap(entry(BASE + 1, 1, LAZY_PRESENT)),
    "pages beyond memory": _pagemap(entry(BASE, 1 << 63, LAZY_PRESENT)),
    "pages that wrap around": _pagemap(entry((1 << 64) - PAGE, 2, LAZY_PRESENT)),
    "pages that overlap": _pagemap(
        entry(BASE, 2, LAZY_PRESENT), entry(BASE + PAGE, 1, LAZY_PRESENT)
    ),
    "pages out of order": _pagemap(
        entry(BASE + PAGE, 1, LAZY_PRESENT), entry(BASE, 1, LAZY_PRESENT)
    ),
    "more than the file has": _pagemap(entry(BASE, 8, LAZY_PRESENT)),
    "terabytes that the file has not": _pagemap(entry(BASE, 1 << 40, LAZY_PRESENT)),
    "in a parent that is not there": _pagemap(entry(BASE, 1, LAZY | PARENT)),
    "nowhere": _pagemap(entry(BASE, 1, 0)),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path: Path, name: str) -> None:
    tree(tmp_path)
    Images(tmp_path)
    BAD[name](tmp_path)
    with pytest.raises(CriuError) as caught:
        Images(tmp_path)
    assert caught.value.reason == "image"
    # While the traceback is alive.
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]


def open_files() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(link))
    return found


def test_each_cut_file_is_refused_or_an_error(tmp_path: Path) -> None:
    """At every length."""
    tree(tmp_path)
    for name in ("pstree.img", "mm-10.img", "pagemap-10.img", "pages-10.img"):
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            (tmp_path / name).write_bytes(whole[:length])
            try:
                images = Images(tmp_path)
            except CriuError:
                continue
            # Cut between two records: the file tells less.
            assert images.content_bytes < 7 * PAGE or len(images.tasks) < 2, (name, length)
        (tmp_path / name).write_bytes(whole)


def test_slices_cover_the_content_once() -> None:
    runs = [Run(BASE + n * 3 * PAGE, BASE + (n * 3 + 2) * PAGE, "f", 0) for n in range(10000)]
    runs.append(Run(BASE + (1 << 30), BASE + (1 << 30) + 3 * SLICE, "f", 0))
    span = LazySpan(BASE, 2 << 30, runs)
    parts = list(slices(span))
    assert parts[0][0] == 0
    assert all(a + b <= c for (a, b), (c, _) in pairwise(parts))
    covered = sum(
        max(0, min(run.end - BASE, at + length) - max(run.start - BASE, at))
        for at, length in parts
        for run in runs
        if at < run.end - BASE and run.start - BASE < at + length
    )
    assert covered == span.content_bytes


def test_the_image_of_a_working_set(tmp_path: Path) -> None:
    """The spans of all processes, one behind the other."""
    images = Images(tree(tmp_path))
    places = places_of(images)
    assert list(places) == list(images.tasks)
    flat = [place for each in places.values() for place in each]
    spans = [span for task in images.tasks.values() for span in task.spans]
    assert [place.length for place in flat] == [span.length for span in spans]
    assert [place.memory for place in flat] == list(range(len(spans)))
    assert [place.offset for place in flat[1:]] == list(
        itertools.accumulate(place.length for place in flat[:-1])
    )
    assert flat[-1].offset + flat[-1].length == length_of(images)
    assert len(images.id) == ID_BYTES
