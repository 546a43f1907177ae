"""tests/vm: copies of a kernel's source, which is Debian's or the user's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm import _debian, _tree


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = tmp_path / "mine"
    texts = {
        "fs/userfaultfd.c": "old\n",
        "arch/x86/kernel/vmlinux.lds.S": "",
        "scripts/.config-check": "",
        ".git/HEAD": "",
        ".config": "",
        "fs/userfaultfd.o": "",
        "include/generated/a.h": "",
    }
    for name, text in texts.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tree / "dts").symlink_to("arch")
    (tree / "link.c").symlink_to("fs/userfaultfd.c")
    return tree


def test_a_copy_follows_the_source_and_keeps_what_was_built(source: Path) -> None:
    copy = _tree.copy(source, "patched")
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*.*")) == [
        "arch/x86/kernel/vmlinux.lds.S",
        "fs/userfaultfd.c",
        "link.c",
    ]
    assert os.readlink(copy / "dts") == "arch"
    (copy / "fs/userfaultfd.o").write_text("built")
    file, changed = source / "fs/userfaultfd.c", copy / "fs/userfaultfd.c"
    changed.write_text("mutated\n")
    assert _tree.copy(source, "patched") == copy
    assert changed.read_text() == "mutated\n"
    file.write_text("new\n")
    later = changed.stat().st_mtime_ns + 1
    os.utime(file, ns=(later, later))
    _tree.copy(source, "patched")
    assert changed.read_text() == "new\n"
    assert (copy / "fs/userfaultfd.o").read_text() == "built"
    assert _tree.copy(source, "mutated") != copy


def test_the_tree_of_the_user(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_debian, "source", lambda series: source.parent / f"debian-{series}")
    monkeypatch.setenv(_tree.OWN, str(source))
    assert _tree.pristine() == _tree.own() == source
    monkeypatch.setenv(_tree.OWN, str(source / "fs"))
    with pytest.raises(_debian.KernelNotFoundError, match="mine/fs has no source"):
        _tree.pristine()
    monkeypatch.delenv(_tree.OWN)
    assert _tree.own() is None
    with pytest.raises(_debian.KernelNotFoundError, match=r"debian-6\.12 has no source"):
        _tree.pristine()


def test_copies_of_trees_of_one_name(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/mine"
    other.mkdir(parents=True)
    assert _tree.copy(source, "a") != _tree.copy(other, "a")
    debian = _debian.cache_dir() / "source/linux-source-6.12"
    debian.mkdir(parents=True)
    assert _tree.copy(debian, "mutated").name == "linux-source-6.12.mutated"
