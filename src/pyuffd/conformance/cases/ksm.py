"""Whether pages that ksmd merges keep their protection (layer L5)."""

from __future__ import annotations

from pyuffd._abi import Feature, PagefaultFlag, RegisterMode, WriteprotectMode
from pyuffd.conformance import _ksm
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANON
from pyuffd.testing._need import needs_privilege

ORIGIN = "mm/ksm.c: replace_page"
PAGES = 4
CONTENT = 0xA7  # no other case uses it: ksmd merges pages of all processes


@case(
    "ksm.merge.keeps-protection",
    origin=ORIGIN,
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
    variants=[
        Variant("kept", "merged or not, the pages stay protected"),
        Variant(
            "lost", "a page that is replaced by an equal one loses its bit, which is a kernel bug"
        ),
    ],
    alone=True,
)
def keeps_protection(ctx: Context) -> None:
    """A write to a protected page sends a message also after ksmd has merged the page."""
    _ksm.require(ctx)
    # The protected pages must be merged into another page, `plain`: the page that others are merged
    # into keeps its bit.
    plain, region = ctx.make(2), ctx.make(PAGES)
    for one in (plain, region):
        one.advise_thp(False)
        one.fill(CONTENT)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    with _ksm.running():
        plain.madvise(_ksm.MERGEABLE)
        _ksm.wait_until_merged(ctx, plain)
        region.madvise(_ksm.MERGEABLE)
        _ksm.wait_until_scanned(ctx, plain, region)
    pages = [region.start + index * ctx.page for index in range(PAGES)]
    ctx.note(f"page frames: {len(set(_ksm.frames(plain, region)))}")
    bits = [ctx.is_protected(page) for page in pages]
    variant = ctx.expect_variant(
        "which pages are protected", bits, kept=[True] * PAGES, lost=[False] * PAGES
    )
    if variant == "lost":
        ctx.silently(ctx.write, pages[0], b"\1")
    else:
        access = ctx.start(ctx.write, pages[0], b"\1")
        ctx.expect_fault(PagefaultFlag.WRITE | PagefaultFlag.WP, pages[0])
        ctx.uffd.writeprotect(pages[0], ctx.page, mode=WriteprotectMode(0))
        access.result()
    ctx.expect("first bytes", [ctx.read(page) for page in pages], [b"\1"] + [bytes([CONTENT])] * 3)
