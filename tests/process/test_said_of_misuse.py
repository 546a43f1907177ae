"""What is said of folders that are no snapshots, and of lengths that no process has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyuffd import Process, Snapshot, SnapshotFormatError
from tests._memory import PAGE
from tests.process._sleeping import process as process
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS


# What is no snapshot


def test_a_directory_that_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(SnapshotFormatError, match=r"no snapshot: it has no manifest\.json"):
        Snapshot.open(tmp_path)


@pytest.mark.parametrize("value", ["a folder", 5, None, b"a"])
def test_a_snapshot_is_opened_by_open(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Snapshot is made by Snapshot.open\(path\)"):
        Snapshot(value)
    if not isinstance(value, str):
        with pytest.raises(TypeError, match="path must be a path"):
            Snapshot.open(value)


# Sizes


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - PAGE])
def test_more_than_there_is_of_anything(process: Process, length: int) -> None:
    """It was OverflowError: cannot fit 'int' into an index-sized integer."""
    with pytest.raises(ValueError, match=rf"length {length:#x}.*process {process.pid}"):
        process.read(0, length)


def test_more_than_there_is_of_memory(process: Process) -> None:
    with pytest.raises(MemoryError, match=r"no memory for 0x4000000000000000 bytes"):
        process.read(0x10000, 1 << 62)
