"""Memory that is not what the call is about: refused with a sentence, not left empty."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    DirtyTracker,
    Feature,
    Handler,
    Mapping,
    PageCategory,
    PageRange,
    Process,
    Region,
    RegisterMode,
    Snapshot,
    Userfaultfd,
)
from pyuffd.testing import FaultingChild, needs
from tests._child import limit_s, run_child
from tests._memory import PAGE
from tests.process._counters import program as program
from tests.process._sleeping import process as process
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS


def take(target: Any, path: Path, **options: Any) -> object:
    kept: dict[str, Any] = {"method": "stopped", "durable": False} | options
    if kept["method"] != "stopped":
        kept.setdefault("max_stall_s", limit_s(1))
    return Snapshot.take(target, path, **kept)


# Regions of this process, for another one


def test_a_snapshot_of_a_region_of_ours(process: Process, tmp_path: Path) -> None:
    """It was an empty snapshot."""
    with (
        Region.anonymous(2 * PAGE) as ours,
    ):
        for ranges in ([ours], [mapping_of(process), ours], iter([ours])):
            with pytest.raises(ValueError, match=rf"{ours.start:#x}.* is memory of this process"):
                take(process, tmp_path / "a", ranges=ranges)
        with pytest.raises(ValueError, match="is memory of this process"):
            DirtyTracker(process, [ours])
        assert not os.listdir(tmp_path)
        assert take(process, tmp_path / "a", ranges=[mapping_of(process)])


def mapping_of(process: Process) -> Mapping:
    return next(one for one in process.mappings() if one.path == "[stack]")


def test_a_snapshot_of_nothing(process: Process, tmp_path: Path) -> None:
    nothing = PageRange(0x10000, 0x11000, PageCategory(0))
    with pytest.raises(ValueError, match=r"nothing mapped in \[0x10000, 0x11000\)"):
        take(process, tmp_path / "a", ranges=[nothing])
    assert not os.listdir(tmp_path)
    # What is mapped there later is tracked.
    DirtyTracker(process, [nothing]).close()


def of_a_fork(path: str) -> None:
    with Region.anonymous(2 * PAGE) as region:
        region.write(0, b"of both")
        pid = os.fork()
        if not pid:
            signal.pause()
        try:
            with Process(pid) as process:
                take(process, Path(path), ranges=[region])
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with Snapshot.open(path) as snapshot:
            assert snapshot.read(region.start, 7) == b"of both"


def test_a_region_that_a_fork_has_too(tmp_path: Path) -> None:
    run_child(of_a_fork, f"{tmp_path}/a", budget_s=20)


@needs(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
@pytest.mark.parametrize("method", ["stopped", "precopy", "auto"])
def test_a_descriptor_of_another_process(method: str, tmp_path: Path) -> None:
    """Its ranges were looked up here: with "precopy" they were not mapped, or something else."""
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.PAGEFAULT_FLAG_WP
    with FaultingChild(4, mode=RegisterMode.WP, features=features) as child:
        child.run("write", 0, b"there")
        take(child.uffd, tmp_path / "a", ranges=[child.region], method=method)
    with Snapshot.open(tmp_path / "a") as snapshot:
        assert snapshot.read(child.region.start, 5) == b"there"


# What is recorded


def test_a_recording_of_memory_that_is_not_served(process: Process, tmp_path: Path) -> None:
    """It waited, and returned an empty working set."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(4 * PAGE) as served,
        Region.anonymous(4 * PAGE) as other,
        Handler(uffd, fault_log=1024) as handler,
    ):
        stack = mapping_of(process)
        take(process, tmp_path / "a", ranges=[stack])
        handler.serve(served, BufferSource(bytes(4 * PAGE)))
        at = stack.end - 4 * PAGE
        with Snapshot.open(tmp_path / "a") as snapshot:
            with pytest.raises(ValueError, match=rf"nothing of \[{other.start:#x}, .* is served"):
                snapshot.record("a", handler, [(served, at), (other, at)], until=0.1)
            served.touch()
            assert len(snapshot.record("a", handler, [(served, at)], until=0.1))
            handler.stop()
