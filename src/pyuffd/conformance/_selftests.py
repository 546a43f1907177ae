"""The kernel's own selftests, result by result, as ids of this suite.

From the selftests of Linux 7.3, for docs/generated/conformance.md. A test checks that every id
exists.
"""

from __future__ import annotations

from pyuffd.conformance._types import ALL, ANON, ANY

_SHARED = ("shmem", "hugetlb")
_STEPS = ("new", "all", "all-but-ends", "protecting", "middle", "two-middle")
_THP_KIB = (16, 32, 64, 128, 256, 512, 1024, 2048)

# Cases, with the selftest's memory types.  Its "shmem-private" is a shared mapping; ours is not.
UNIT_TESTS: dict[str, tuple[str, ...]] = {
    "api-syscall": ANY,
    "api-device": ANY,
    "register-ioctls": ALL,
    "zeropage": ALL,
    "move": ANON,
    "move-pmd": ANON,
    "move-pmd-split": ANON,
    "wp-fork": ALL,
    "wp-fork-with-event": ALL,
    "wp-fork-pin": ALL,
    "wp-fork-pin-with-event": ALL,
    "wp-unpopulated": ANON,
    "minor": _SHARED,
    "minor-wp": _SHARED,
    "minor-collapse": ("shmem",),
    "sigbus": ALL,
    "sigbus-wp": ALL,
    "events": ALL,
    "events-wp": ALL,
    "poison": ALL,
    "mmap-changing": ("shmem",),
    "rwp-async": ALL,
    "rwp-sync": ALL,
    "rwp-pagemap": ALL,
    "rwp-mprotect": ALL,
    "rwp-gup": ALL,
    "rwp-async-toggle": ALL,
    "rwp-close": ALL,
    "rwp-fork": ALL,
    "rwp-fork-pin": ANON,
    "rwp-swap-cow": ANON,
    "rwp-wp-exclusive": ALL,
}


def unit_tests() -> list[str]:
    """Return the ids of uffd-unit-tests."""
    return [f"kselftest.{name}.{kind}" for name, memory in UNIT_TESTS.items() for kind in memory]


def wp_mremap() -> list[str]:
    """Return the ids of uffd-wp-mremap, on a kernel with huge pages of 2 MiB only."""
    sizes = ["4k", *(f"{size}k" for size in _THP_KIB)]
    small = [
        f"kselftest.{name}.{size}.{kind}"
        for size in sizes
        for name in ("wp-mremap", "wp-mremap-swapped")
        for kind in ("anon", "shmem")
    ]
    huge = [f"kselftest.wp-mremap.hugetlb-page.{kind}" for kind in ("hugetlb-private", "hugetlb")]
    return small + huge


def stress() -> list[str]:
    """Return the ids of uffd-stress."""
    return [f"kselftest.stress.{kind}" for kind in ALL]


def pagemap_ioctl() -> list[str]:
    """Return the ids of pagemap_ioctl, in the order of its results."""
    sanity = (
        "empty-range",
        "vec-null",
        "vec-len-zero",
        "no-vec",
        "flags-all",
        "flags-more",
        "mask-zero",
        "return-zero",
        "return-unknown",
        "mask-unknown",
        "inverted-all",
    )
    limits = (
        "clear",
        "every-second",
        "parts",
        "max-pages",
        "sub-range",
        "two-mappings",
        "smaller-max-pages",
        "small-vec",
    )
    walks = (
        "empty",
        "empty-protecting",
        "empty-without-room",
        "dense-big-vec",
        "dense-vec-1",
        "dense-vec-1-max-all",
        "dense-max-half",
        "dense-max-1",
        "dense-max-unlimited",
        "sparse-big-vec",
        "sparse-vec-1",
        "sparse-vec-1-max-all",
        "sparse-vec-half-max-all",
        "sparse-vec-all-max-all",
        "sparse-max-half",
        "sparse-max-1",
    )
    base = (
        ("base", "anon"),
        ("base-large", "anon"),
        ("base-thp", "any"),
        ("base-sysv-hugetlb", "any"),
        ("base-map-hugetlb", "any"),
        ("base", "hugetlb"),
        ("base-disk-file", "any"),
        ("base", "shmem-private"),
    )
    thp = (
        "new",
        "again",
        "all",
        "middle",
        "first-half",
        "max-pages",
        "second-half",
        "part",
        "rest",
    )
    names = [
        *(f"sanity.{name}.anon" for name in sanity),
        *(f"limits.{name}.anon" for name in limits),
        *(f"walk-end.{name}.anon" for name in walks),
        *(f"{kind}.{step}.{memory}" for kind, memory in base for step in _STEPS),
        *(f"thp.{name}.any" for name in thp),
        "simple.anon",
        *(f"mprotect.{name}.anon" for name in ("written", "protected", "remapped", "again")),
        *(f"transact.{name}.anon" for name in ("written", "protected", "threads")),
        *(
            f"masks.{name}.anon"
            for name in ("protecting", "mask", "anyof", "inverted", "mask-anyof")
        ),
        *(
            f"categories.{name}.anon"
            for name in (
                "anyof",
                "mask",
                "mask-and-anyof",
                "written-inverted",
                "present-inverted",
                "anyof-protecting",
            )
        ),
        "file.mapped.any",
        "file.written.any",
        "unmapped.any",
        "prot-none.anon",
        "zero-page.anon",
        "zero-page-thp.anon",
        "dropped.anon",
        "dropped-thp.any",
    ]
    return [f"kselftest.pagemap-ioctl.{name}" for name in names]
