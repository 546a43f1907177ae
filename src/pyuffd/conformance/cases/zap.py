"""The write-protect series, patches 10 and 23: what actions leave of a protected page (layer L5).

Each row is an action on a protected page with data in a range registered in mode WP only, and what
it leaves on each memory type.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Access, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ALL, FILE, HUGETLB, PRIVATE, SHARED, SHMEM, SMALL, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    IN_FILE,
    MAP_FIXED_NOREPLACE,
    MARKER,
    PROT_NONE,
    PUNCH_HOLE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    move_mapping,
    page_out,
    present,
    protected,
    reserve,
    smaps,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import Need, needs_privilege, needs_swap

MADV_COLD, MADV_PAGEOUT = 20, 21
ZERO_RANGE = 0x10 | 0x1  # FALLOC_FL_KEEP_SIZE
SYS_MLOCK, SYS_MUNLOCK = 149, 150
KEPT, DROPPED, CLEAN = "present and protected", "a marker", "a hole"


@dataclass(frozen=True)
class After:
    """What the action leaves.

    Attributes:
        state: A protected page (KEPT), a marker (DROPPED), or a hole (CLEAN).
        value: The byte that fills the page when it is read.
        code: The errno of the action.
    """

    state: str = KEPT
    value: int = DATA
    code: int = 0

    def __str__(self) -> str:
        name = f", with {errno.errorcode[self.code]}" if self.code else ""
        return f"{self.state}{name}"


@dataclass(frozen=True)
class Row:
    """An action, and what it leaves on each memory type.

    With `drops_data`, the marker may be dropped with the data, as in v5 of the series.
    """

    name: str
    text: str
    act: Callable[[Context, Region], None]
    after: dict[str, After]
    needs: list[Need] = field(default_factory=list)
    drops_data: bool = False


def _advise(advice: int) -> Callable[[Context, Region], None]:
    return lambda _, region: region.madvise(advice)


def _fallocate(mode: int) -> Callable[[Context, Region], None]:
    def act(_: Context, region: Region) -> None:
        assert region.fd is not None
        _memory.fallocate(region.fd, mode, 0, region.length)

    return act


def _truncate(_: Context, region: Region) -> None:
    assert region.fd is not None
    os.ftruncate(region.fd, 0)
    os.ftruncate(region.fd, region.length)


def _map_again(_: Context, region: Region) -> None:
    _memory.munmap(region.start, region.length)
    flags = (mmap.MAP_SHARED if region.shared else mmap.MAP_PRIVATE) | MAP_FIXED_NOREPLACE
    fd = -1 if region.fd is None else region.fd
    flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
    _memory.mmap(region.length, READ_WRITE, flags, fd, 0, region.start)


def _mprotect(_: Context, region: Region) -> None:
    for protection in (PROT_NONE, mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(region.start, region.length, protection)


def _same(memory: tuple[str, ...], after: After) -> dict[str, After]:
    return dict.fromkeys(memory, after)


ZERO = After(DROPPED, 0)
IN_FILE_ONLY = After(DROPPED, IN_FILE)
VARIANTS = (
    Variant("marker-stays", "dropping the data leaves a marker; no feature bit tells"),
    Variant("marker-goes", "as in v5 of the series: dropping the data drops the protection"),
)
NOT_HUGETLB = _same(HUGETLB, After(code=errno.EINVAL))
ROWS = (
    Row("nothing", "no action", lambda _, region: None, _same(ALL, After())),
    Row(
        "dontneed",
        "MADV_DONTNEED",
        _advise(mmap.MADV_DONTNEED),
        {
            "anon": After(CLEAN, 0),
            **_same(SHARED, After(DROPPED)),
            **_same(("shmem-private", "hugetlb-private"), IN_FILE_ONLY),
        },
    ),
    Row(
        "pageout",
        "MADV_PAGEOUT",
        page_out,
        _same(SMALL, After(DROPPED)),
        [needs_swap()],
    ),
    Row("pageout-refused", "MADV_PAGEOUT", _advise(MADV_PAGEOUT), NOT_HUGETLB),
    Row(
        "remove",
        "MADV_REMOVE",
        _advise(mmap.MADV_REMOVE),
        {
            "anon": After(code=errno.EINVAL),
            **_same(SHARED, ZERO),
            **_same(("shmem-private", "hugetlb-private"), After(code=errno.EACCES)),
        },
        drops_data=True,
    ),
    Row(
        "punch-hole",
        "punching a hole in the file",
        _fallocate(PUNCH_HOLE),
        {"shmem-private": After(), **_same(("shmem", *HUGETLB), ZERO)},
        drops_data=True,
    ),
    Row(
        "truncate",
        "truncating the file to 0 and growing it again",
        _truncate,
        {**_same(SHMEM, ZERO), **_same(HUGETLB, After(CLEAN, 0))},
        drops_data=True,
    ),
    Row(
        "zero-range",
        "fallocate(2) with FALLOC_FL_ZERO_RANGE",
        _fallocate(ZERO_RANGE),
        _same(FILE, After(code=errno.EOPNOTSUPP)),
    ),
    Row(
        "map-again",
        "munmap and a new mmap",
        _map_again,
        {
            "anon": After(CLEAN, 0),
            **_same(SHARED, After(CLEAN)),
            **_same(("shmem-private", "hugetlb-private"), After(CLEAN, IN_FILE)),
        },
    ),
    Row("mprotect", "mprotect to PROT_NONE, to PROT_READ and back", _mprotect, _same(ALL, After())),
    Row(
        "free",
        "MADV_FREE",
        _advise(mmap.MADV_FREE),
        {"anon": After(), **_same(FILE, After(code=errno.EINVAL))},
    ),
    Row("cold", "MADV_COLD", _advise(MADV_COLD), {**_same(SMALL, After()), **NOT_HUGETLB}),
)


def _run(ctx: Context, row: Row) -> None:
    after = row.after[ctx.memory.name]
    in_one_place(ctx)
    region = protected(ctx)
    if after.code:
        ctx.expect_errno(after.code, row.act, ctx, region)
    else:
        ctx.silently(row.act, ctx, region)
    marker, found = MARKER[ctx.memory.name], ctx.pagemap(region.start)
    if row.drops_data and after.state == DROPPED:
        ctx.expect_variant("pagemap", found, marker_stays=marker, marker_goes=HOLE)
    else:
        states = {KEPT: present(ctx), DROPPED: marker, CLEAN: HOLE}
        ctx.expect("pagemap", found, states[after.state])
    expect_read(ctx, region.start, after.value)
    if found == HOLE:
        expect_silent_write(ctx, region.start)
        return
    ctx.expect("uffd-wp bit after a read", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)
    expect_silent_write(ctx, region.start)


def _add(row: Row) -> None:
    for patch, types in (("10", SMALL), ("23", HUGETLB)):
        memory = tuple(name for name in types if name in row.after)
        if not memory:
            continue
        case(
            f"wp-series.{patch}.{row.name}",
            summary=f"After {row.text}, a protected page is {_said(row, memory)}",
            origin=f"patch {patch}: markers across zaps",
            memory=memory,
            features=wp_features,
            needs=row.needs,
            variants=VARIANTS if row.drops_data else [],
        )(lambda ctx: _run(ctx, row))


def _said(row: Row, memory: tuple[str, ...]) -> str:
    kinds: dict[str, list[str]] = {}
    for name in memory:
        kinds.setdefault(str(row.after[name]), []).append(name)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())


for _row in ROWS:
    _add(_row)


def _both(
    name: str, text: str, memory: tuple[str, ...] = ALL, **options: object
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Make a case of patch 10 on small pages and of patch 23 on hugetlb."""

    def add(function: Callable[[Context], None]) -> Callable[[Context], None]:
        for patch, types in (("10", SMALL), ("23", HUGETLB)):
            if of := tuple(one for one in memory if one in types):
                case(
                    f"wp-series.{patch}.{name}",
                    summary=text,
                    origin=f"patch {patch}: markers across zaps",
                    memory=of,
                    **{"features": wp_features, **options},  # type: ignore[arg-type]
                )(function)
        return function

    return add


def _with_marker(ctx: Context) -> Region:
    """Make two protected pages; on file memory, turn the second into a marker."""
    region = protected(ctx, 2)
    if not ctx.memory.is_anon:
        region.madvise(mmap.MADV_DONTNEED, ctx.page, ctx.page)
        ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])
    return region


def _marked(ctx: Context, start: int) -> list[int]:
    return [at for at in (start, start + ctx.page) if ctx.is_protected(at)]


@_both("mprotect-marker", "mprotect to PROT_NONE, to PROT_READ and back keeps markers", FILE)
def _mprotect_marker(ctx: Context) -> None:
    region = _with_marker(ctx)
    _mprotect(ctx, region)
    ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start + ctx.page)
    expect_write_fault(ctx, region.start)


def _lock(region: Region) -> int:
    return syscall(SYS_MLOCK, region.start, region.length)


LOCKING = [needs_privilege("CAP_IPC_LOCK")]


@_both(
    "mlock-private",
    "mlock of private memory sends one message 3 for each protected page and marker",
    PRIVATE,
    needs=LOCKING,
)
def _mlock_private(ctx: Context) -> None:
    region = _with_marker(ctx)
    locking: Access[int] = ctx.start(_lock, region)
    for index in range(2):
        at = region.start + index * ctx.page
        expect_fault(ctx, locking, WP_WRITE, at)
        ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
    ctx.expect("mlock", locking.result(), 0)
    ctx.expect_quiet()
    for index in range(2):
        at = region.start + index * ctx.page
        ctx.expect_pagemap(at, present(ctx, protected=False))
        expect_silent_write(ctx, at)
    syscall(SYS_MUNLOCK, region.start, region.length)


@_both(
    "mlock-shared",
    "mlock of shared memory sends no message; markers become pages, and all stay protected",
    SHARED,
    needs=LOCKING,
)
def _mlock_shared(ctx: Context) -> None:
    region = _with_marker(ctx)
    ctx.expect("mlock", ctx.silently(_lock, region), 0)
    for index in range(2):
        at = region.start + index * ctx.page
        ctx.expect_pagemap(at, present(ctx))
        expect_read(ctx, at, DATA)
        expect_write_fault(ctx, at)
    syscall(SYS_MUNLOCK, region.start, region.length)


@_both("mremap", "mremap without EVENT_REMAP drops bits, markers and the registration")
def _mremap(ctx: Context) -> None:
    region = _with_marker(ctx)
    target = reserve(ctx, region.length)
    move_mapping(ctx, region, target)
    ctx.expect("pages protected at the new address", _marked(ctx, target), [])
    flags = smaps(target).get("VmFlags", "").split()
    ctx.expect("whether VmFlags has uw", "uw" in flags, False)
    expect_read(ctx, target, DATA)
    for at in (target, target + ctx.page):
        expect_silent_write(ctx, at)


def _remap_features(memory: MemoryType) -> Feature:
    return wp_features(memory) | Feature.EVENT_REMAP


@_both(
    "mremap-with-event",
    "mremap with EVENT_REMAP sends the event, and moves the protection too",
    features=_remap_features,
)
def _mremap_with_event(ctx: Context) -> None:
    region = _with_marker(ctx)
    start, length = region.start, region.length
    target = reserve(ctx, length)
    moving = ctx.start(move_mapping, ctx, region, target)
    ctx.expect("the event", ctx.expect_event(Remap), Remap(start, target, length))
    moving.result()
    ctx.expect("whether VmFlags has uw", "uw" in smaps(target).get("VmFlags", "uw").split(), True)
    ctx.expect("pages protected", _marked(ctx, target), [target, target + ctx.page])
    expect_read(ctx, target, DATA)
    for at in (target, target + ctx.page):
        expect_write_fault(ctx, at)


@_both("unregister", "UNREGISTER unprotects only its part of the range")
def _unregister(ctx: Context) -> None:
    region = protected(ctx, 2)
    ctx.uffd.unregister(region.start, ctx.page)
    ctx.expect("pages protected", _marked(ctx, region.start), [region.start + ctx.page])
    expect_silent_write(ctx, region.start)
    expect_write_fault(ctx, region.start + ctx.page)


@_both("close", "Closing the userfaultfd unprotects pages and markers")
def _close(ctx: Context) -> None:
    region = _with_marker(ctx)
    ctx.uffd.close()
    ctx.expect("pages protected", _marked(ctx, region.start), [])
    for at in (region.start, region.start + ctx.page):
        expect_silent_write(ctx, at)


@_both(
    "private-keeps-file",
    "A write to a protected private page after its copy was dropped does not change the file",
    ("shmem-private", "hugetlb-private"),
)
def _private_keeps_file(ctx: Context) -> None:
    region = protected(ctx)
    region.madvise(mmap.MADV_DONTNEED)
    expect_write_fault(ctx, region.start)
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        ctx.expect("bytes of the file", view.read(0, 8), bytes([IN_FILE]) * 8)


@_both(
    "remove-missing",
    "After MADV_REMOVE in mode MISSING, a protected page is missing",
    SHARED,
    features=lambda memory: (
        wp_features(memory)
        | (Feature.MISSING_HUGETLBFS if memory.is_hugetlb else Feature.MISSING_SHMEM)
    ),
)
def _remove_missing(ctx: Context) -> None:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING | RegisterMode.WP)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.uffd.writeprotect(region)
    region.madvise(mmap.MADV_REMOVE)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name], HOLE)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, 0, region.start)
    ctx.uffd.zeropage(region.start, ctx.page) if ctx.memory.is_shmem else ctx.uffd.copy(
        region.start, bytes(ctx.page)
    )
    ctx.expect("the read", reading.result(), b"\0")
