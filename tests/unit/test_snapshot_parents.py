"""A snapshot finds its parent by its hash, whatever else lies beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pyuffd import RunState, Snapshot, SnapshotFormatError
from tests._images import START, Part, data, write
from tests._memory import PAGE


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A chain whose parent was renamed, among names that are none or bad ones of it."""
    parent = write(tmp_path / "0", [(START, [data(2)])])
    write(tmp_path / "child", [(START, [Part(2, RunState.PARENT)])], parent=parent)
    os.rename(parent, tmp_path / "the parent")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "another" / "manifest.json").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    (tmp_path / "nowhere").symlink_to("nobody")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def test_other_things_beside_it(moved: Path) -> None:
    with Snapshot.open(moved / "child") as snapshot:
        assert snapshot.read(START, 2 * PAGE) == data(2).content


def test_a_copy_that_is_cut(moved: Path) -> None:
    """Another copy will do; if there is none, the error names the file that is cut."""
    shutil.copytree(moved / "the parent", moved / "copy")
    os.truncate(moved / "copy" / "pages", PAGE)
    test_other_things_beside_it(moved)
    shutil.rmtree(moved / "the parent")
    with pytest.raises(SnapshotFormatError) as caught:
        Snapshot.open(moved / "child")
    assert caught.value.path == str(moved / "copy" / "pages")


def test_none_beside_it(moved: Path) -> None:
    shutil.rmtree(moved / "the parent")
    with pytest.raises(SnapshotFormatError, match="neither at '0' nor beside it") as caught:
        Snapshot.open(moved / "child")
    assert caught.value.path == str(moved / "child")
