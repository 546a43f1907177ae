"""tests/vm: the initramfs."""

from __future__ import annotations

import importlib.util
import marshal
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm import _image


@dataclass(frozen=True)
class Entry:
    mode: int
    mtime: int
    data: bytes


def unpack(archive: bytes) -> dict[str, Entry]:
    """Read a newc archive as Linux's Documentation/driver-api/early-userspace describes it."""
    entries: dict[str, Entry] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_bytes, data_bytes = fields[11], fields[6]
        name = archive[at + 110 : at + 110 + name_bytes - 1].decode()
        at = (at + 110 + name_bytes + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        entries[name] = Entry(fields[1], fields[5], archive[at : at + data_bytes])
        at = (at + data_bytes + 3) & ~3


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    folder = tmp_path_factory.mktemp("image")
    busybox = folder / "busybox"
    busybox.write_bytes(b"busybox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: str(busybox))
        _image.build(folder / "initramfs", b"the job")
    return unpack((folder / "initramfs").read_bytes())


def test_init_comes_first_and_the_proof_of_completeness_last(entries: dict[str, Entry]) -> None:
    files = [name for name, entry in entries.items() if not stat.S_ISDIR(entry.mode)]
    assert files[:3] == ["init", "bin/busybox", "bin/sh"]
    assert list(entries)[-1] == _image.LAST


def test_everything_has_a_parent_before_it(entries: dict[str, Entry]) -> None:
    seen = {"."}
    for name, entry in entries.items():
        parent = str(Path(name).parent)
        assert parent in seen, name
        if stat.S_ISDIR(entry.mode):
            seen.add(name)


def test_python_runs_at_its_own_path(entries: dict[str, Entry]) -> None:
    name = sys.executable.lstrip("/")
    while stat.S_ISLNK(entries[name].mode):
        target = Path("/", name).parent / entries[name].data.decode()
        name = str(Path(*target.resolve().parts)).lstrip("/")
    assert entries[name].data == Path(sys.executable).resolve().read_bytes()
    assert entries["vm/python"].data.decode() == sys.executable


def test_sources_keep_their_time_for_the_pyc(entries: dict[str, Entry]) -> None:
    path = Path(_image.__file__).resolve()
    entry = entries[str(path).lstrip("/")]
    assert entry.mtime == int(path.stat().st_mtime)
    assert entry.data == path.read_bytes()


def test_tests_and_their_packages_are_there(entries: dict[str, Entry]) -> None:
    root = str(_image.ROOT).lstrip("/")
    for name in ("pyproject.toml", "tests/conftest.py", "tests/vm/_guest.py"):
        assert f"{root}/{name}" in entries
    for module in ("_pytest/config/__init__.py", "xdist/__init__.py", "cffi/__init__.py"):
        assert any(name.endswith(f"/{module}") for name in entries), module


def test_without_busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(_image.MissingOnHostError, match="busybox-static"):
        _image.build(tmp_path / "initramfs", b"")


def test_the_package_comes_compiled(entries: dict[str, Entry]) -> None:
    path = Path(_image.__file__).resolve()
    compiled = entries[importlib.util.cache_from_source(str(path)).lstrip("/")]
    code = marshal.loads(compiled.data[16:])
    assert code.co_filename == str(path)
    # Not checked against the source's time.
    assert int.from_bytes(compiled.data[4:8], "little") == 1
