"""The layer rule for the C: a file includes lower floors only; headers declare what is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.unit.test_layers import words_of_design

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# From bottom to top. A module is a .c file with its header, or either alone. It includes modules of
# lower floors, and none of its own floor.
FLOORS = [
    {"base/threads", "base/poll"},
    {"uffd_abi", "base/page", "base/array", "base/line", "base/clock", "base/gentle", "base/tasks"},
    {"uffd_shim", "uffd_transfer", "uffd_pagemap", "uffd_owner", "access/sigbus", "access/guarded"},
    {"watch/watched", "watch/reads", "uffd_residency"},
    {"watch/waiters", "watch/gil"},
    {"watch/words"},
    {"watch/watch"},
    {"uffd_owned", "access/access", "access/ended"},
    {"dirty/ranges", "remote/cold", "remote/maps", "remote/thread", "remote/unregister"},
    {
        "snapshot/places",
        "dirty/drops",
        "dirty/round",
        "remote/memory",
        "remote/pins",
        "remote/trace",
        "remote/frame",
    },
    {"dirty/arm", "remote/inject", "remote/registers", "snapshot/image"},
    {
        "snapshot/ring",
        "snapshot/guard",
        "snapshot/unread",
        "snapshot/owed",
        "snapshot/pages",
        "remote/device",
    },
    {"snapshot/chain", "snapshot/hot", "snapshot/replace"},
    {"snapshot/saving"},
    {"snapshot/sweeping"},
    {"snapshot/answering"},
    {"snapshot/saver"},
    {"remote/attach", "remote/stopped"},
    {"engine/alloc", "engine/runs", "engine/tracebacks"},
    {"engine/barrier", "engine/fill", "engine/file", "engine/placement"},
    {"engine/overlay"},
    {"engine/content"},
    {"engine/table", "engine/types"},
    {"engine/hold", "engine/shared"},
    {"engine/core"},
    {"engine/stats", "engine/gate", "engine/page_table", "engine/report"},
    {
        "engine/crowd",
        "engine/failures",
        "engine/pause",
        "engine/say",
        "engine/pending",
        "engine/queue",
        "engine/range",
        "engine/registered",
    },
    {"engine/expected", "engine/vacated", "engine/cut"},
    {"engine/space", "engine/put"},
    {"engine/grown", "engine/left"},
    {"engine/spaces", "engine/slices", "engine/layout", "engine/stray"},
    {"engine/save", "engine/states", "engine/serve"},
    {"engine/resolve", "engine/promise", "engine/evict", "engine/open"},
    {"engine/from_here"},
    {"engine/prefetch", "engine/answer", "engine/populate", "engine/supply", "engine/inline"},
    {
        "engine/drain",
        "engine/stall",
        "engine/retry",
        "engine/load",
        "engine/from_files",
        "engine/write_back",
    },
    {"engine/step"},
    {"engine/loop", "engine/patience"},
    {"engine/request", "engine/seal"},
    {"engine/unserve"},
    {"engine/native", "engine/serve_many"},
    {"engine/end", "engine/successor"},
    {"engine/engine"},
]
MOST_LINES = 450


def sources(root: Path = CSRC) -> Iterator[Path]:
    yield from sorted(root.rglob("*.[ch]"))


def module(path: Path, root: Path = CSRC) -> str:
    return str(path.relative_to(root).with_suffix(""))


def includes(path: Path, root: Path = CSRC) -> Iterator[str]:
    """Yield the modules whose headers a file includes, without its own."""
    for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
        beside = path.parent / name
        target = module(beside if beside.exists() else root / name, root)
        if target != module(path, root):
            yield target


def floor_of(name: str) -> int:
    for number, modules in enumerate(FLOORS):
        if name in modules:
            return number
    raise AssertionError(f"csrc/{name} is on no floor: add it to FLOORS")


def back_references(root: Path = CSRC) -> list[str]:
    """Return every include of a module that is not on a lower floor."""
    return [
        f"{path.relative_to(root)} includes {target}.h, which is not on a lower floor"
        for path in sources(root)
        for target in includes(path, root)
        if floor_of(target) >= floor_of(module(path, root))
    ]


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


@cache
def words(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", without_comments(path.read_text())))


PROTOTYPE = re.compile(r"^(?!static)[\w *]+?\b(\w+)\([^;{}]*\);", re.MULTILINE)


def prototypes(header: Path) -> set[str]:
    """Return the functions that a header declares and does not define."""
    return set(PROTOTYPE.findall(without_comments(header.read_text())))


def used_inline(header: Path) -> frozenset[str]:
    """Return the words of a header without its prototypes."""
    return frozenset(re.findall(r"\w+", PROTOTYPE.sub("", without_comments(header.read_text()))))


def definitions(source: Path) -> Mapping[str, bool]:
    """Return the functions that a file defines, and whether each is static."""
    text = without_comments(source.read_text())
    found = re.findall(r"^(static )?[\w *]+?\b(\w+)\([^;{}]*\)\s*\{", text, re.MULTILINE)
    return {name: bool(static) for static, name in found}


def test_every_module_stands_on_one_floor() -> None:
    named = [name for modules in FLOORS for name in modules]
    assert sorted(named) == sorted({module(path) for path in sources()})


def test_design_names_every_module() -> None:
    names = {module(path).rpartition("/")[2] for path in sources()}
    assert names - words_of_design() == set()


def test_the_way_of_a_fault_in_design_is_the_way_in_the_code() -> None:
    """Each row of that table names a file, and first functions that this file defines."""
    text = (CSRC.parent / "docs" / "design.md").read_text()
    section = text[text.index("### One fault, from read() to UFFDIO_COPY") :].partition("\n### ")[0]
    rows = re.findall(r"^\| `(\w+\.c)` \| (`[^:|]+):", section, re.MULTILINE)
    assert len(rows) == section.count("\n| `")
    for file, functions in rows:
        place = CSRC / file if file.startswith("uffd_") else CSRC / "engine" / file
        assert set(re.findall(r"`(\w+)`", functions)) <= set(definitions(place)), file
    named = set(re.findall(r"`(\w+_\w+)`", section))
    assert named <= frozenset().union(*(words(path) for path in sources()))


def test_includes_go_down() -> None:
    assert back_references() == []


def test_a_back_reference_is_found(tmp_path: Path) -> None:
    for path in sources():
        copy = tmp_path / path.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    assert back_references(tmp_path) == []
    below = tmp_path / "engine" / "resolve.c"
    below.write_text('#include "step.h"\n' + below.read_text())
    assert len(back_references(tmp_path)) == 1


@pytest.mark.parametrize("header", [path for path in sources() if path.suffix == ".h"], ids=module)
def test_a_header_declares_what_its_own_file_defines(header: Path) -> None:
    declared = prototypes(header)
    source = header.with_suffix(".c")
    assert declared <= set(definitions(source) if source.exists() else ())


@pytest.mark.parametrize("source", [path for path in sources() if path.suffix == ".c"], ids=module)
def test_what_is_not_static_is_in_the_header_and_used_elsewhere(source: Path) -> None:
    public = {name for name, static in definitions(source).items() if not static}
    header = source.with_suffix(".h")
    assert public == prototypes(header)
    for_python = words(CSRC / "uffd_shim.cdef")
    others = [words(path) for path in sources() if path not in (source, header)]
    others.append(used_inline(header))
    unused = {name for name in public - for_python if not any(name in each for each in others)}
    assert unused == set()


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(CSRC)))
def test_a_file_can_be_read_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
