"""Region in Python and numpy: no copies, and mapped as long as a view of it is alive."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyuffd import ClosedError, Region
from tests._memory import Memory


def test_memoryview_is_the_memory(memory: Memory) -> None:
    region = memory.pages(1)
    view = region.memoryview()
    assert (view.nbytes, view.format, view.readonly) == (region.length, "B", False)
    view[5] = 7
    assert region.read(5, 1) == b"\7"
    region.write(6, b"\x08")
    assert view[6] == 8
    view.release()
    region.close()


def test_numpy_is_zero_copy(memory: Memory) -> None:
    region = memory.pages(2)
    array = np.asarray(region)
    assert array.dtype == np.uint8
    assert array.shape == (region.length,)
    assert array.__array_interface__["data"] == (region.start, False)
    array.view(np.uint64)[1] = 0x0102030405060708
    assert region.read(8, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    region.write(0, b"\x2a")
    assert array[0] == 42
    del array
    region.close()


def is_mapped(address: int) -> bool:
    """Whether an address lies in a mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


DERIVED: dict[str, Callable[[Region], Any]] = {
    "array": np.asarray,
    "part-of-an-array": lambda region: np.asarray(region)[10:20].reshape(2, 5).view(np.int8),
    "memoryview": lambda region: region.memoryview(),
    "slice": lambda region: region.memoryview()[1:3],
    "cast": lambda region: region.memoryview().cast("H")[1:],
}


@pytest.mark.crossing
@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_a_view_keeps_the_memory_mapped(memory: Memory, derive: Callable[[Region], Any]) -> None:
    region = memory.pages(1)
    stopped: list[bool] = []
    region._on_close(lambda: stopped.append(True))
    start, other = region.start, region.memoryview()
    region.write(0, bytes([1, 2, 3, 4]) * 8)
    view = derive(region)
    fd = region.fd
    region.close()
    region.close()
    assert stopped
    assert region.closed
    if fd is not None:
        with pytest.raises(OSError):
            os.fstat(fd)
    with pytest.raises(ClosedError):
        region.read()
    assert len(view)
    assert other[1] == 2
    del view
    gc.collect()
    assert is_mapped(start)
    other.release()
    del other
    assert not is_mapped(start)


def test_the_exception_of_the_body_is_kept() -> None:
    """Its traceback refers to the frame, and the frame to the array."""
    starts: list[int] = []

    def work() -> None:
        with Region.anonymous(4096) as region:
            starts.append(region.start)
            array = np.asarray(region)
            array[0] = 1
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        work()
    assert caught.value.__context__ is None
    assert is_mapped(starts[0])
    del caught
    gc.collect()
    assert not is_mapped(starts[0])


def test_a_view_dies_in_another_thread(memory: Memory) -> None:
    region = memory.pages(1)
    start = region.start
    views = [region.memoryview() for _ in range(4)]
    region.close()
    threads = [threading.Thread(target=views.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not is_mapped(start)


def test_an_array_keeps_its_region_alive() -> None:
    array = np.asarray(Region.anonymous(4096))
    gc.collect()
    array[7] = 9
    assert array[7] == 9
    with pytest.warns(ResourceWarning):
        del array
        gc.collect()


def test_read_only_region_gives_read_only_views() -> None:
    with Region.memfd(4096) as region:
        region.write(0, b"r")
        assert region.fd is not None
        with Region.file(region.fd, writable=False) as readonly:
            view = readonly.memoryview()
            assert view.readonly
            array = np.asarray(readonly)
            assert not array.flags.writeable
            assert array[0] == ord("r")
            with pytest.raises(ValueError):
                array[0] = 1
            with pytest.raises(TypeError):
                view[0] = 1
            del view, array


def test_digest_leaves_no_view_behind(memory: Memory) -> None:
    region = memory.pages(1)
    region.digest()
    region.close()
