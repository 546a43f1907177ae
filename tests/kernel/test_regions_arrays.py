"""Region as Python and numpy see it: zero copy, and alive as long as it is looked at."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pyuffd import Region
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


def test_close_refuses_while_an_array_lives(memory: Memory) -> None:
    region = memory.pages(1)
    stopped: list[bool] = []
    region.on_close(lambda: stopped.append(True))
    part = np.asarray(region)[10:20].reshape(2, 5).view(np.int8)
    with pytest.raises(BufferError):
        region.close()
    assert not stopped
    assert not region.closed
    part[0, 0] = 3
    assert region.read(10, 1) == b"\3"
    del part
    region.close()
    assert stopped


@pytest.mark.parametrize("derive", [lambda v: v, lambda v: v[1:3], lambda v: v.cast("H")[1:]])
def test_close_refuses_while_a_memoryview_lives(memory: Memory, derive: object) -> None:
    assert callable(derive)
    region = memory.pages(1)
    view = derive(region.memoryview())
    with pytest.raises(BufferError):
        region.close()
    view.release()
    del view
    region.close()


def test_failed_exit_of_the_context_keeps_the_memory() -> None:
    region = Region.anonymous(4096)
    with pytest.raises(BufferError), region:
        view = region.memoryview()
    view[0] = 1
    del view
    region.close()


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
