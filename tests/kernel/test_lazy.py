"""`lazy`: a source as memory, in one `with`."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyuffd
from pyuffd import (
    CallableSource,
    ClosedError,
    FileSource,
    HandlerError,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing._memory_types import MEMORY_TYPES
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import content, everywhere, open_fds, thread_names
from tests.process._process_sources import page, page_later

DRIVERS: Any = ("native", "inline", "thread", "process")
DATA = content(3 * PAGE - 100)


def options(name: str) -> dict[str, Any]:
    memory = MEMORY_TYPES[name]
    return {
        "kind": "anonymous" if memory.is_anon else "memfd",
        "shared": memory.shared or memory.is_anon,
        "huge_page_size": memory.page_size if memory.is_hugetlb else None,
    }


def everything(driver: Any, name: str) -> None:
    with pyuffd.lazy(b"x"):  # descriptors of the first use in a process stay open
        pass
    before = open_fds()
    page_size = MEMORY_TYPES[name].page_size
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        with pyuffd.lazy(file.name, driver=driver, **options(name)) as memory:
            assert memory.length == -(-len(DATA) // page_size) * page_size
            assert memory.page_size == page_size
            assert memory.handler.driver == driver
            assert memory.read(PAGE, 5) == DATA[PAGE : PAGE + 5]
            view = memory.memoryview()
            assert view[7] == DATA[7]
            view.release()
            array = np.asarray(memory)
            if driver != "thread":  # it holds the GIL
                assert array[2 * PAGE] == DATA[2 * PAGE]
            memory.write(0, b"mine")
            assert memory[:4].read() == b"mine"
            assert len(memory.handler.page_states(memory)) == memory.length // page_size
            assert memory.handler.populate(memory) >= 0
            assert memory.read() == b"mine" + DATA[4:].ljust(memory.length - 4, b"\0")
            del array
        assert memory.closed
        assert memory.uffd.closed
        memory.close()
    assert open_fds() <= before


test_everything = pytest.mark.crossing(everywhere(everything, drivers=DRIVERS))


def sources() -> None:
    for given, want in (
        (DATA, DATA),
        (bytearray(DATA), DATA),
        (ZeroSource(), bytes(2 * PAGE)),
        (page, page(0, 2 * PAGE)),
        (page_later, page(0, 2 * PAGE)),
    ):
        length = None if isinstance(given, bytes | bytearray) else 2 * PAGE - 1
        with pyuffd.lazy(given, length) as memory:
            assert memory.read(0, len(want)) == want
            assert memory.length == -(-len(want) // PAGE) * PAGE


def test_sources_of_any_kind() -> None:
    run_child(sources, budget_s=20)


def of_a_region() -> None:
    with (
        Region.shm("pyuffd-test-lazy", 4 * PAGE, unlink=True) as region,
        pyuffd.lazy(content(2 * PAGE), region=region[PAGE : 3 * PAGE]) as memory,
    ):
        assert memory.length == 2 * PAGE
        assert region.read(PAGE, 2 * PAGE) == content(2 * PAGE)
        memory.close()
        assert not region.closed
        assert region.read(2 * PAGE, PAGE) == content(2 * PAGE)[PAGE:]
        with pyuffd.lazy(DATA, region=region[3 * PAGE :]) as other:
            assert other.read() == DATA[:PAGE]
            region.close()
            assert other.closed


def test_of_a_region_that_stays_the_callers() -> None:
    run_child(of_a_region)


def kept_by_views() -> None:
    """Objects made of it keep it alive and served."""
    array = np.asarray(pyuffd.lazy(DATA))
    view = pyuffd.lazy(DATA).memoryview()
    part = pyuffd.lazy(DATA)[PAGE:]
    gc.collect()
    assert array[2 * PAGE] == DATA[2 * PAGE]
    assert view[2 * PAGE] == DATA[2 * PAGE]
    assert part.read(PAGE, 1) == DATA[2 * PAGE : 2 * PAGE + 1]
    with pytest.warns(ResourceWarning, match="unclosed <LazyRegion"):
        del array, view, part
        gc.collect()
    gc.collect()
    assert not [name for name in thread_names() if name.startswith("uffd-")]


def test_it_lives_as_long_as_a_view_of_it() -> None:
    run_child(kept_by_views)


def closed_with_a_view() -> None:
    with pyuffd.lazy(DATA) as memory:
        view = memory.memoryview()
        assert view[0] == DATA[0]
    assert view[1] == DATA[1]
    for use in (memory.read, lambda: memory.start, lambda: memory[:5], memory.memoryview):
        with pytest.raises(ClosedError):
            use()


def test_what_was_loaded_stays_in_a_view() -> None:
    run_child(closed_with_a_view)


def broken(offset: int, length: int) -> bytes:
    raise OSError(5, "no such page")


def failing() -> None:
    with pyuffd.lazy(b"x"):  # descriptors of the first use in a process stay open
        pass
    before = open_fds()
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        memory = pyuffd.lazy(file.name)
        with pytest.raises(HandlerError), memory, pytest.raises(PagePoisonedError):
            file.truncate(0)
            memory.read()
    assert memory.closed
    assert memory.uffd.closed
    assert open_fds() == before
    with (
        pytest.raises(HandlerError),
        pyuffd.lazy(broken, PAGE, driver="thread") as memory,
        pytest.raises(PagePoisonedError),
    ):
        memory.read()


@pytest.mark.parametrize("kept", [False, True], ids=["goes", "kept"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_what_goes_away_is_not_poisoned(driver: Any, kept: bool) -> None:
    """It takes as long as a fault for each page, and there may be 2^28 of them."""
    memory = pyuffd.lazy(__file__, driver=driver)
    pages = memory.length // PAGE
    view = memory.memoryview() if kept else None
    memory.read(0, 1)
    memory.close()
    assert memory.handler.stats().poisoned_pages == (pages - 1 if kept else 0)
    assert view is None or bytes(view[:10]) == Path(__file__).read_bytes()[:10]


async def closed_in_a_loop() -> int:
    async with pyuffd.lazy(page_later, 8 * PAGE, driver="thread") as memory:
        await asyncio.to_thread(memory.read, 0, 1)
    return memory.handler.stats().poisoned_pages


def test_what_goes_away_at_the_end_of_async_with_is_not_poisoned() -> None:
    assert asyncio.run(closed_in_a_loop()) == 0


def test_a_failure_is_raised_and_everything_closed() -> None:
    run_child(failing)


def in_a_loop() -> None:
    async def main() -> bytes:
        async with pyuffd.lazy(page_later, 2 * PAGE, driver="thread") as memory:
            return await asyncio.to_thread(memory.read)

    assert asyncio.run(main()) == page(0, 2 * PAGE)


def test_async_with() -> None:
    run_child(in_a_loop)


def write_tracking() -> None:
    mode = RegisterMode.MISSING | RegisterMode.WP
    features = pyuffd.Feature.PAGEFAULT_FLAG_WP
    with pyuffd.lazy(DATA, mode=mode, features=features) as memory:
        memory.write(PAGE, b"new")
        memory.read(0, 1)
        states = [PageState(state) for state in memory.handler.page_states(memory)]
        assert states == [PageState.CLEAN, PageState.DIRTY, PageState.ABSENT]


def test_modes() -> None:
    run_child(write_tracking)


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no-length": (ZeroSource(), {}, ValueError, "no end"),
    "function-without-length": (page, {}, ValueError, "no end"),
    "zero-length": (DATA, {"length": 0}, ValueError, "above zero"),
    "text-length": (DATA, {"length": "5"}, TypeError, "length"),
    "too-long": (DATA, {"length": 5 * PAGE}, ValueError, "ends before"),
    "kind": (DATA, {"kind": "shm"}, ValueError, "region="),
    "private-anonymous": (DATA, {"shared": False}, ValueError, "memfd"),
    "huge-page-size": (DATA, {"huge_page_size": 5}, ValueError, "0x5"),
    "driver": (DATA, {"driver": "fast"}, ValueError, "fast"),
    "no-source": (5, {}, TypeError, "FileSource"),
    "none": (None, {}, TypeError, "source"),
    "no-region": (DATA, {"region": b"x"}, TypeError, "region"),
    "no-file": ("/nonexistent", {}, FileNotFoundError, "nonexistent"),
    "buffer-elsewhere": (DATA, {"driver": "process"}, ValueError, "memory of this process"),
}


def refused() -> None:
    before = open_fds()
    warnings.simplefilter("error")
    for source, given, error, named in BAD.values():
        with pytest.raises(error, match=named):
            pyuffd.lazy(source, **given)
    with Region.anonymous(PAGE) as region:
        for own in ({"length": PAGE}, {"noreserve": True}):
            with pytest.raises(ValueError, match="of its own"):
                pyuffd.lazy(DATA, region=region, **own)
    with Region.anonymous(3 * PAGE) as region:
        region.write(0, b"x")
        with pytest.raises(ValueError, match="already present"):
            pyuffd.lazy(DATA, region=region)
        assert region.read(0, 1) == b"x"
    with pytest.raises(TypeError, match="lazy"):
        pyuffd.LazyRegion()
    gc.collect()
    assert open_fds() == before


def test_bad_arguments_leave_nothing_behind() -> None:
    run_child(refused, budget_s=30)


def test_the_source_may_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with FileSource(path) as source:
        memory = pyuffd.lazy(source)
    with memory:
        assert memory.read(PAGE, 5) == DATA[PAGE : PAGE + 5]


def test_it_is_a_region_of_a_userfaultfd() -> None:
    with pyuffd.lazy(CallableSource(page, PAGE)) as memory:
        assert isinstance(memory, Region)
        assert isinstance(memory.uffd, Userfaultfd)
        assert "LazyRegion by the process driver" in repr(memory)
