"""Each lost page's error has what its source raised as the cause, with the process driver too."""

from __future__ import annotations

import pytest

from pyuffd import CallableSource, Handler, HandlerError, PagePoisonedError, Region, Userfaultfd

PAGES = 4


def fail(offset: int, length: int) -> bytes:
    raise LookupError(f"no page at {offset}")


def cause_at(region: Region, offset: int) -> str:
    with pytest.raises(PagePoisonedError) as caught:
        region.read(offset, 1)
    return str(caught.value.__cause__)


def causes_with(driver: str) -> list[str]:
    with Userfaultfd() as uffd, Region.anonymous(PAGES * 4096) as region:
        handler = Handler(uffd, driver=driver)  # type: ignore[arg-type]
        handler.serve(region, CallableSource(fail))
        handler.start()
        found = [cause_at(region, offset) for offset in range(0, region.length, 4096)]
        with pytest.raises(HandlerError):
            handler.stop()
    return found


def test_cause_of_each_page() -> None:
    causes = causes_with("process")
    assert causes == [f"no page at {offset}" for offset in range(0, PAGES * 4096, 4096)]
