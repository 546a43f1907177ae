"""`-o` of the commands, where it cannot be made: one sentence, status 2, and nobody is touched."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import Process, Snapshot
from pyuffd.cli import main
from pyuffd.remote import _attach, _stop
from tests._child import run_child
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
COMMANDS = ("core", "core of a snapshot", "snapshot", "flatten")
# What is at the path (the folder is D), and what the command says of it.
PATHS = {
    "in a file": ("file/x", "pyuffd: D/file: Not a directory\n"),
    "nowhere": ("nowhere/x", "pyuffd: D/nowhere: No such file or directory\n"),
    "a file": ("file", "pyuffd: D/file: File exists; choose another name, or remove it\n"),
    "a folder": ("full", "pyuffd: D/full: File exists; choose another name, or remove it\n"),
    "a link": ("link", "pyuffd: D/link: File exists; choose another name, or remove it\n"),
    "not ours": ("not-ours/x", "pyuffd: D/not-ours: Permission denied\n"),
}
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may pass, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o711)
        yield Path(path)


def wait_for_exec(pid: int) -> None:
    """Wait for "sleep" to run: in execve(2), a process may not be looked at by its own user."""
    while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
        time.sleep(0.001)


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as child:
        wait_for_exec(child.pid)
        yield child.pid
        child.kill()


def words_of(command: str, pid: int, folder: Path) -> list[str]:
    match command:
        case "core of a snapshot":
            return ["core", "--from", f"{folder}/snapshot"]
        case "flatten":
            return ["flatten", f"{folder}/snapshot"]
    return [command, str(pid)]


def touched(*_: object, **__: object) -> None:
    raise AssertionError("the process was touched")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_where_nothing_can_be_made(
    command: str,
    name: str,
    sleeper: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, said = PATHS[name]
    with Process(sleeper) as process:
        Snapshot.take(process, folder / "snapshot", method="stopped", durable=False)
    (folder / "file").write_text("precious")
    (folder / "full").mkdir()
    (folder / "full/precious").touch()
    (folder / "link").symlink_to("nowhere")
    (folder / "not-ours").mkdir(mode=0o555)
    monkeypatch.setattr(_attach, "attach", touched)
    monkeypatch.setattr(_stop, "stop", touched)
    words = words_of(command, sleeper, folder)
    before = sorted(folder.rglob("*"))
    if name == "not ours" and not os.geteuid():
        ended = run_child(as_nobody, [*words, "-o", str(folder / path)], str(folder))
        status, error = ended.value, ended.stderr
    else:
        status, error = main([*words, "-o", str(folder / path)]), capsys.readouterr().err
    assert (status, error) == (2, said.replace("D", str(folder), 1))
    assert sorted(folder.rglob("*")) == before
    assert (folder / "file").read_text() == "precious"


def as_nobody(words: list[str], folder: str) -> int:
    """Run a command as another user, for a process and a snapshot of its own."""
    from pyuffd.cli import core, flatten, snapshot  # noqa: F401 - while they can be read

    for at in [Path(folder) / "snapshot", *(Path(folder) / "snapshot").iterdir()]:
        os.chown(at, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with subprocess.Popen(["sleep", "60"]) as child:
        words = [str(child.pid) if word.isdecimal() else word for word in words]
        wait_for_exec(child.pid)
        try:
            return main(words)
        finally:
            child.kill()
