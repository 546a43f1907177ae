"""Mappings that meet a limit: the error names it.  Regions larger than memory (`noreserve`)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyuffd import (
    CallableSource,
    Feature,
    Handler,
    PageState,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs_hugepages
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from tests._child import run_child
from tests._memory import PAGE

GIB = 1 << 30
MCL_FUTURE = 2
NOBODY = 65534
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


def needs_overcommit_guess() -> pytest.MarkDecorator:
    """Skip unless Linux refuses mappings that are obviously too large (vm.overcommit_memory 0)."""

    def missing() -> tuple[list[str], str]:
        mode = OVERCOMMIT.read_text().strip()
        return ([] if mode == "0" else ["overcommit"]), f"it is {mode}"

    return marked(Need("vm.overcommit_memory=0", missing))


def more_than_memory() -> int:
    """Return a length above the memory and swap of this machine."""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    return (total // GIB + 2) * GIB


def refused(length: int, **options: Any) -> UffdOSError:
    with pytest.raises(UffdOSError) as caught:
        Region.anonymous(length, **options).close()
    return caught.value


def overcommit() -> None:
    length = more_than_memory()
    makers: list[Any] = [
        Region.anonymous,
        lambda n, **options: Region.memfd(n, shared=False, **options),
    ]
    for make in makers:
        with pytest.raises(UffdOSError) as caught:
            make(length)
        assert caught.value.errno == errno.ENOMEM
        assert "vm.overcommit_memory" in caught.value.hint
        assert "noreserve" in caught.value.hint
        with make(length, noreserve=True) as region:
            assert region.read(length - 8, 8) == bytes(8)
    with Region.memfd(length) as shared:  # is not counted
        assert shared.read(length - 8, 8) == bytes(8)


@needs_overcommit_guess()
def test_more_than_memory_and_swap() -> None:
    run_child(overcommit)


def sparse(driver: str, mode: int) -> None:
    length = more_than_memory()
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        Userfaultfd(features=features) as uffd,
        Region.anonymous(length, noreserve=True) as region,
        Handler(uffd, driver=driver) as handler,  # type: ignore[arg-type]
    ):
        handler.serve(region, ZeroSource(), mode=RegisterMode(mode))
        handler.start()
        for at in (0, 5 * GIB, length - PAGE):
            region.write(at, b"here")
            assert region.read(at, 5) == b"here\0"
            assert handler.page_states(region, at, PAGE)[0] in (PageState.CLEAN, PageState.DIRTY)
        assert handler.populate(region, GIB, 1 << 20) == 1 << 20


@pytest.mark.parametrize("driver", ["native", "inline"])
@pytest.mark.parametrize("mode", [RegisterMode.MISSING, RegisterMode.MISSING | RegisterMode.WP])
def test_serving_more_than_memory(driver: str, mode: RegisterMode) -> None:
    run_child(sparse, driver, mode, budget_s=30)


def sparse_python_source() -> None:
    def content(offset: int, length: int) -> bytes:
        return (offset // PAGE).to_bytes(8, "little") * (length // 8)

    length = more_than_memory()
    with (
        Userfaultfd() as uffd,
        Region.memfd(length, shared=False, noreserve=True) as region,
        Handler(uffd, driver="thread") as handler,
    ):
        handler.serve(region, CallableSource(content), mode=RegisterMode.MISSING)
        handler.start()
        assert region.read(length - PAGE, 8) == (length // PAGE - 1).to_bytes(8, "little")
        handler.unserve(region)


def test_python_source_for_more_than_memory() -> None:
    """Stopping to serve it poisons millions of absent pages."""
    run_child(sparse_python_source, budget_s=60)


def address_space() -> None:
    error = refused(1 << 50, noreserve=True)
    assert error.errno == errno.ENOMEM
    assert "address space" in error.hint


def test_more_than_an_address_space_has() -> None:
    run_child(address_space)


def limited(which: int) -> None:
    resource.setrlimit(which, (GIB, resource.getrlimit(which)[1]))
    error = refused(2 * GIB)
    assert error.errno == errno.ENOMEM
    name = "RLIMIT_AS" if which == resource.RLIMIT_AS else "RLIMIT_DATA"
    assert name in error.hint
    assert "1 GiB" in error.hint


@pytest.mark.parametrize("which", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["as", "data"])
def test_resource_limit(which: int) -> None:
    run_child(limited, which)


def locked() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)  # without CAP_IPC_LOCK
    assert libc.mlockall(MCL_FUTURE) == 0
    error = refused(1 << 20)
    assert error.errno == errno.EAGAIN
    assert "RLIMIT_MEMLOCK" in error.hint
    assert "64 KiB" in error.hint


def test_locked_memory() -> None:
    run_child(locked)


def too_many_mappings() -> None:
    limit = int(MAX_MAP_COUNT.read_text())
    libc = ctypes.CDLL(None, use_errno=True)
    with Region.anonymous((limit + 10) * PAGE) as cut:
        page = 0
        while libc.mprotect(ctypes.c_void_p(cut.start + page * PAGE), PAGE, 1) == 0:
            page += 2
        with pytest.raises(UffdOSError) as caught, contextlib.ExitStack() as regions:
            for _ in range(4):
                regions.enter_context(Region.memfd(PAGE))
        assert libc.mprotect(ctypes.c_void_p(cut.start), cut.length, 3) == 0
    assert caught.value.errno == errno.ENOMEM
    assert "vm.max_map_count" in caught.value.hint
    assert str(limit) in caught.value.hint


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_too_many_mappings() -> None:
    if int(MAX_MAP_COUNT.read_text()) > 1 << 18:
        pytest.skip("vm.max_map_count is too high to be met in a test")
    run_child(too_many_mappings, budget_s=30)


def huge_pages_without_a_reservation() -> None:
    length = (free_hugepages() + 64) * HUGE_PAGE
    assert refused(length, huge_page_size=HUGE_PAGE).errno == errno.ENOMEM
    with Region.anonymous(length, huge_page_size=HUGE_PAGE, noreserve=True) as region:
        region.write(HUGE_PAGE, b"one")
        assert region.read(HUGE_PAGE, 4) == b"one\0"
    with (
        Region.memfd(length, huge_page_size=HUGE_PAGE, noreserve=True) as region,
        region.alias() as alias,
    ):
        region.write(length - HUGE_PAGE, b"one")
        assert alias.read(length - HUGE_PAGE, 3) == b"one"


@needs_hugepages(2)
def test_huge_pages_without_a_reservation() -> None:
    run_child(huge_pages_without_a_reservation)


def test_reserve_and_noreserve_contradict(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ValueError, match="noreserve"):
        Region.file(path, reserve=True, noreserve=True)
    with Region.file(path, shared=False, noreserve=True) as region:
        assert region.read() == bytes(PAGE)
