"""Files of images, on file systems that lack something."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyuffd import _memory
from pyuffd._errors import UffdOSError
from pyuffd.snapshot import _core_file
from pyuffd.snapshot._core_file import NewFile
from pyuffd.snapshot._output import punch, write_at


@pytest.mark.parametrize("has_holes", [True, False])
def test_punch(has_holes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole or zeros, not behind the end of the file, which keeps its length."""

    def refuse(*_args: int) -> None:
        raise UffdOSError(errno.EOPNOTSUPP, "fallocate")

    if not has_holes:
        monkeypatch.setattr(_memory, "fallocate", refuse)
    path = tmp_path / "file"
    path.write_bytes(b"a" * 12288)
    with open(path, "r+b") as file:
        punch(file.fileno(), 4096, 4096)
        punch(file.fileno(), 8192, 1 << 20)
        write_at(file.fileno(), b"end", 12285)
    assert path.read_bytes() == b"a" * 4096 + bytes(8189) + b"end"


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_name_without_tmpfile(
    has_links: bool, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden name is replaced by the real one, which never replaces a file."""

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_core_file, "_unnamed", lambda _folder: None)
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "core"
    with NewFile(path) as file:
        write_at(file.fileno(), b"new", 0)
        if is_taken:
            path.write_bytes(b"old")
            with pytest.raises(FileExistsError):
                file.publish(durable=False)
        else:
            file.publish(durable=False)
    assert path.read_bytes() == (b"old" if is_taken else b"new")
    assert os.listdir(tmp_path) == ["core"]
