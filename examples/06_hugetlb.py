"""Huge pages: one fault brings 2 MiB.

A hugetlb region has faults, ioctls and states of its own page size; nothing else differs. If
no huge pages are available the example says how to get some.
"""

from __future__ import annotations

from pyuffd import BufferSource, Handler, PageState, Region, UffdOSError, Userfaultfd

HUGE_PAGE = 2 << 20
PAGES = 4


def main() -> None:
    """Serve a hugetlb memfd from a buffer, and touch half of it."""
    try:
        region = Region.memfd(PAGES * HUGE_PAGE, huge_page_size=HUGE_PAGE)
    except UffdOSError as error:
        print(f"no huge pages: {error}")
        return
    content = b"".join(bytes([ord("a") + page]) * HUGE_PAGE for page in range(PAGES))
    with Userfaultfd() as uffd, region, Handler(uffd) as handler:
        ioctls = handler.serve(region, BufferSource(content))
        print(f"{region!r}\nsupports {ioctls!r}")
        for page in (1, 3):
            for offset in (0, HUGE_PAGE // 2, HUGE_PAGE - 1):
                letter = region.read(page * HUGE_PAGE + offset, 1)
                assert letter == content[page * HUGE_PAGE + offset :][:1]
            print(f"page {page}: {letter.decode()}")
        states = [PageState(state).name for state in handler.page_states(region)]
        print(f"{handler.stats().faults['missing']} faults; pages: {', '.join(states)}")


if __name__ == "__main__":
    main()
