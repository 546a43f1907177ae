"""docs/generated/conformance.md, from the cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pyuffd._abi import Feature
from pyuffd.conformance import _selftests
from pyuffd.conformance._case import Case
from pyuffd.conformance._left_out import LEFT_OUT
from pyuffd.conformance._types import ANY
from pyuffd.testing._memory_types import MEMORY_TYPES

_HEAD = """\
# The conformance suite

What does this kernel do with userfaultfd? Each case asks one question, with or without pyuffd, and
its id names the behaviour that differs if it fails. [Released kernels](kernel-matrix.md) and
[tests on another kernel](../kernels.md) have results.

Written by `pyuffd conformance list --markdown` from the cases; do not edit.

`pyuffd conformance run [-k EXPR] [--report FILE]` runs the suite from an installed package,
`pytest tests/kernel/conformance` from a checkout (`--uffd-report=FILE`; `-n 2` works). Both print a
matrix of behaviour by memory type at the end and write it as FILE.json and FILE.html.
`pyuffd conformance diff A B` compares two JSON reports. A case is skipped only where a feature bit,
an ioctl or hardware is missing; `PYUFFD_TESTS=require` turns that into a failure, except for what
`PYUFFD_TESTS_MAY_LACK` names. A WARN or BUG of the kernel fails the run. This page ends with the
kernel's selftests, result by result, and what is not checked.

An id is `CASE.MEMORY`. Memory types: anon; shmem (a memfd mapped MAP_SHARED); shmem-private
(MAP_PRIVATE, which the kernel's own selftests never test); hugetlb; hugetlb-private; any (it does
not matter). Letters of a page's state, from /proc/PID/pagemap: P present, S swap or a
marker, F file or shared, W write-protected by userfaultfd, X exclusive. Messages by their flags:
0 missing read, 1 missing write, 3 write to a write-protected page, 4 minor, 5 minor write.
"""


def markdown(cases: Mapping[str, Case]) -> str:
    """Return the page that describes these cases."""
    return "\n".join(_page(cases)) + "\n"


def _page(cases: Mapping[str, Case]) -> Iterator[str]:
    # Imported late: it imports the parts of crossings, which need everything that running needs.
    from pyuffd.conformance import _crossings_page

    yield _HEAD
    total = sum(len(case.memory) for case in cases.values())
    yield f"{len(cases)} cases, {total} with their memory types.\n"
    groups: dict[str, list[Case]] = {}
    crossings = [case for case in cases.values() if case.is_crossing]
    for case in cases.values():
        if not case.is_crossing:
            groups.setdefault(case.name.partition(".")[0], []).append(case)
    for group, members in groups.items():
        yield f"## {group}\n"
        yield "| case | behaviour | memory | needs | from |"
        yield "|---|---|---|---|---|"
        for case in members:
            cells = (
                f"`{case.name}`",
                case.summary + "".join(_variants(case)),
                _memory(case.memory),
                "; ".join(_needs(case)) or "-",
                case.origin,
            )
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    if crossings:
        yield from _crossings_page.page(sum(len(case.memory) for case in crossings if case.is_slow))
    if set(_selftests.UNIT_TESTS) <= {name.partition(".")[2] for name in cases}:
        yield from _selftest_pages(cases)
        yield from _left_out()


def _selftest_pages(cases: Mapping[str, Case]) -> Iterator[str]:
    yield "## The kernel's selftests, result by result\n"
    yield (
        "The results that the selftests of Linux 7.3 report about userfaultfd, and their ids here."
        " Many cases\nrun on more memory types here, and each starts from scratch, while theirs"
        " continue with what is left. Sizes are smaller:\na few pages instead of 32 MiB, 4 huge"
        " pages instead of 10, 10 random patterns instead of 100, 4 threads and 50 rounds\ninstead"
        " of 6 and 1000.\n"
    )
    units = _selftests.UNIT_TESTS
    yield (
        f"`uffd-unit-tests` has {len(_selftests.unit_tests())} results:"
        " `kselftest.CASE.MEMORY` for each of these cases and memory types.\n"
    )
    yield "| case | memory types there | memory types here |"
    yield "|---|---|---|"
    for name, there in units.items():
        here = cases[f"kselftest.{name}"].memory
        yield f"| {name} | {_memory(there)} | {_memory(here)} |"
    yield (
        "\nOnly the kernel's gup_test can take a long-term pin for reading. So `wp-fork-pin` pins"
        " for writing, with an io_uring\nfixed buffer, and `wp-fork-read-pin` pins as the original"
        " does, if the kernel has gup_test."
    )
    mremap = _selftests.wp_mremap()
    yield (
        f"\n`uffd-wp-mremap` has {len(mremap)}, for huge pages of 2 MiB:"
        f" `{mremap[0]}` to `{mremap[-1]}`. `uffd-stress` has {len(_selftests.stress())}:"
        " `kselftest.stress.MEMORY`, here with write-protection, and harder as"
        " `kselftest.stress-swapping.MEMORY`.\n"
    )
    results = _selftests.pagemap_ioctl()
    yield f"`pagemap_ioctl` has {len(results)}.\n"
    yield "| result | id here | behaviour |"
    yield "|---|---|---|"
    for number, full in enumerate(results, 1):
        yield f"| {number} | `{full}` | {cases[full.rpartition('.')[0]].summary} |"
    yield ""


def _left_out() -> Iterator[str]:
    yield "## What is not checked\n"
    yield "| what | why |"
    yield "|---|---|"
    for what, why in LEFT_OUT:
        yield f"| {what} | {why} |"


def _memory(names: Sequence[str]) -> str:
    return "all five" if tuple(names) == tuple(MEMORY_TYPES) else ", ".join(names)


def _variants(case: Case) -> Iterator[str]:
    for variant in case.variants:
        yield f"<br>*{variant.name}*: {variant.text}"


def _needs(case: Case) -> Iterator[str]:
    by_features: dict[Feature, list[str]] = {}
    for name in case.memory:
        features = case.features_on(MEMORY_TYPES.get(name, MEMORY_TYPES["anon"]))
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
        yield "`--slow`"
