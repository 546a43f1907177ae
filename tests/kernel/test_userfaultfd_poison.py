"""UFFDIO_POISON: SIGBUS for a thread that touches the page, EFAULT for the kernel."""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import signal

import pytest

from pyuffd import (
    Feature,
    LayoutChangedError,
    PageExistsError,
    PartialResolveError,
    PoisonMode,
    Region,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._faults import Task, next_fault, no_events, registered
from tests.kernel._serving import peek

pytestmark = needs(Feature.POISON)


def kernel_reads(region: Region, offset: int = 0) -> int:
    """Let the kernel read one byte of a region; return the errno, or 0."""
    sink = os.memfd_create("sink")
    view = region.memoryview()
    try:
        os.pwritev(sink, [view[offset : offset + 1]], 0)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(sink)
        del view
    return 0


def touch_poison(name: str, waits: bool) -> None:
    """Touch a poisoned page, or a missing one that is then poisoned."""
    faulthandler.disable()  # it looks at other threads' frames, and may fault there itself
    factory = memory_of(name)
    region = factory.pages(1)
    with registered(region) as uffd:
        if waits:
            task = Task(peek, region)
            next_fault(uffd)
        print("poisoning", flush=True)
        uffd.poison(region)
        if waits:
            task.result()
        else:
            peek(region)


@pytest.mark.parametrize("waits", [False, True], ids=["later", "waiting"])
@pytest.mark.parametrize("memory", memory_params())
def test_touching_is_sigbus(memory: str, waits: bool) -> None:
    assert run_child(touch_poison, memory, waits, expect=-signal.SIGBUS).stdout == "poisoning\n"


def test_poison(memory: Memory) -> None:
    region = memory.pages(3)
    size = memory.page_size
    with registered(region) as uffd:
        assert uffd.poison(region.start + size, size) == size
        for number in (0, 2):
            uffd.copy(region.start + number * size, bytes(size))
        assert [kernel_reads(region, number * size) for number in range(3)] == [
            0,
            errno.EFAULT,
            0,
        ]
        assert no_events(uffd)


def test_present_page(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region) as uffd:
        with pytest.raises(PageExistsError) as caught:
            uffd.poison(region)
        assert caught.value.errno == errno.EEXIST
        assert region.read(0, 1) == b"\x01"


def test_stopped_by_a_present_page(memory: Memory) -> None:
    region = memory.pages(3)
    size = memory.page_size
    region.write(size, b"\x01")
    with registered(region) as uffd:
        with pytest.raises(PartialResolveError) as caught:
            uffd.poison(region)
        assert caught.value.completed == size
        assert kernel_reads(region) == errno.EFAULT
        assert kernel_reads(region, size) == 0


def test_fill_poison(memory: Memory) -> None:
    region = memory.pages(4)
    size = memory.page_size
    region.write(size, b"\x01")
    with registered(region) as uffd:
        result = uffd.fill_poison(region)
        assert (result.done, result.already_present, result.deferred) == (3 * size, size, 0)
        assert kernel_reads(region, 3 * size) == errno.EFAULT
        assert region.read(size, 1) == b"\x01"


def test_copy_replaces_poison(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        uffd.poison(region)
        assert uffd.copy(region.start, b"\x05" * memory.page_size) == memory.page_size
        assert region.read(0, 1) == b"\x05"


def test_poison_outlives_registration(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        uffd.poison(region)
        uffd.unregister(region)
        assert kernel_reads(region) == errno.EFAULT
    assert kernel_reads(region) == errno.EFAULT
    region.madvise(mmap.MADV_DONTNEED)
    assert kernel_reads(region) == 0
    assert region.read(0, 1) == b"\0"


@needs_kernel_faults()
def test_without_waking(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(kernel_reads, region)
        next_fault(uffd)
        uffd.poison(region, mode=PoisonMode.DONTWAKE)
        assert task.running
        uffd.wake(region)
        assert task.result() == errno.EFAULT


def test_unknown_mode(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.poison(region, mode=PoisonMode(1 << 40))
        assert caught.value.errno == errno.EINVAL
        assert uffd.copy(region.start, bytes(memory.page_size)) == memory.page_size


def test_unregistered(memory: Memory) -> None:
    region = memory.pages(1)
    with Userfaultfd() as uffd, pytest.raises(LayoutChangedError) as caught:
        uffd.poison(region)
    assert caught.value.errno == errno.ENOENT
    assert kernel_reads(region) == 0
