"""docs/conformance.md, from the cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pyuffd._abi import Feature
from pyuffd.conformance._case import Case
from pyuffd.conformance._types import ANY, TYPES

_HEAD = """\
# The conformance suite

Written by `pyuffd conformance list --markdown` from the cases; do not edit.

`pyuffd conformance run [-k EXPR] [--report FILE]` runs the suite from an installed package,
`pytest tests/kernel/conformance` from a checkout (`--uffd-report=FILE`; `-n 2` works). Both print a
matrix of behaviour by memory type at the end and write it as FILE.json and FILE.html.
`pyuffd conformance diff A B` compares two JSON reports. A case is skipped only where a feature bit,
an ioctl or hardware is missing; `PYUFFD_TESTS=require` turns that into a failure, except for what
`PYUFFD_TESTS_MAY_LACK` names. A WARN or BUG of the kernel fails the run.

An id is `CASE.MEMORY`. Memory types: anon; shmem (a memfd mapped MAP_SHARED); shmem-private
(MAP_PRIVATE, which the kernel's own selftests never test); hugetlb; hugetlb-private; any (it does
not matter). Letters of a page's state, as /proc/PID/pagemap tells it: P present, S swap or a
marker, F file or shared, W write-protected by userfaultfd, X exclusive. Messages by their flags:
0 missing read, 1 missing write, 3 write to a write-protected page, 4 minor, 5 minor write.
"""


def markdown(cases: Mapping[str, Case]) -> str:
    """Return the page that describes these cases."""
    return "\n".join(_page(cases)) + "\n"


def _page(cases: Mapping[str, Case]) -> Iterator[str]:
    yield _HEAD
    total = sum(len(case.memory) for case in cases.values())
    yield f"{len(cases)} cases, {total} with their memory types.\n"
    groups: dict[str, list[Case]] = {}
    for case in cases.values():
        groups.setdefault(case.name.partition(".")[0], []).append(case)
    for group, members in groups.items():
        yield f"## {group}\n"
        yield "| case | behaviour | memory | needs | from |"
        yield "|---|---|---|---|---|"
        for case in members:
            cells = (
                f"`{case.name}`",
                case.summary + "".join(_variants(case)),
                ", ".join(case.memory) if case.memory != tuple(TYPES) else "all five",
                "; ".join(_needs(case)) or "-",
                case.origin,
            )
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _variants(case: Case) -> Iterator[str]:
    for variant in case.variants:
        yield f"<br>*{variant.name}*: {variant.text}"


def _needs(case: Case) -> Iterator[str]:
    by_features: dict[Feature, list[str]] = {}
    for name in case.memory:
        features = case.features_on(TYPES.get(name, TYPES["anon"]))
        by_features.setdefault(features, []).append(name)
    for features, names in by_features.items():
        if features:
            text = " ".join(bit.name or hex(bit) for bit in features)
            yield (
                text
                if len(by_features) == 1 or names == list(ANY)
                else (f"{text} ({', '.join(names)})")
            )
    for need in case.needs:
        yield need.what
    if case.is_slow:
        yield "asked for with --slow"
