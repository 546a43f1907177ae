"""Which pages of shared memory were written: by write-protect faults, and by PAGEMAP_SCAN.

With a Handler the first write to a page is a fault, which marks the page and lets the write
continue. With Feature.WP_ASYNC the kernel does that itself, and PAGEMAP_SCAN reads the result and
protects again in one step. Either way only writes through this mapping are seen: not those of
other mappings, write(2) on the memfd, or another process.
"""

from __future__ import annotations

from pyuffd import (
    Feature,
    Handler,
    PageCategory,
    Pagemap,
    PageState,
    Region,
    RegisterMode,
    ScanFlag,
    Userfaultfd,
    probe,
)

PAGE = 4096
PAGES = 256
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


def by_faults(region: Region) -> None:
    """Track two rounds of writes with a Handler."""
    with Userfaultfd(features=WP) as uffd, Handler(uffd) as handler:
        handler.serve(region, None, mode=RegisterMode.WP)
        for written in ([3, 4, 200], [4]):
            handler.writeprotect(region)
            for page in written:
                region.write(page * PAGE, b"new")
            states = handler.page_states(region)
            dirty = [page for page, state in enumerate(states) if state == PageState.DIRTY]
            print(f"by faults: pages {dirty} were written")
            assert dirty == written
        print(f"           {handler.stats().faults['wp']} faults")


def by_scan(region: Region) -> None:
    """Track two rounds of writes with PAGEMAP_SCAN; nobody handles a fault."""
    with Userfaultfd(features=WP | Feature.WP_ASYNC) as uffd, Pagemap() as pagemap:
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region)
        for written in ([3, 4, 200], [4]):
            for page in written:
                region.write(page * PAGE, b"new")
            scan = pagemap.scan(
                region,
                category_mask=PageCategory.WRITTEN,
                flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
            )
            dirty = [
                (address - region.start) // PAGE
                for found in scan.ranges
                for address in range(found.start, found.end, PAGE)
            ]
            print(f"by scan:   pages {dirty} were written")
            assert dirty == written


def main() -> None:
    """Show each way that this kernel supports."""
    support = probe()
    with Region.memfd(PAGES * PAGE) as region:
        region.fill(0x2E)
        if WP in support.features:
            by_faults(region)
        else:
            print("by faults: this kernel does not write-protect shared memory (Linux 5.19)")
        if Feature.WP_ASYNC in support.features and support.pagemap_scan:
            by_scan(region)
        else:
            print("by scan:   this kernel has no WP_ASYNC or no PAGEMAP_SCAN (Linux 6.7)")


if __name__ == "__main__":
    main()
