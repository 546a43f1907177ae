"""`pyuffd track` as a program: JSON, lines, a picture, and every way to end it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import Process
from pyuffd.cli import main
from tests._child import limit_s
from tests.process._attach import wait_until
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
LIMIT_S = 30
WRITER = """
import mmap, time
memory = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("ready", flush=True)
while True:
    for page in range(64):
        memory[page * 4096] = page
    time.sleep(0.01)
"""
KEYS = {"seconds", "written_bytes", "dropped_bytes", "dirty_bytes", "mappings", "blind_bytes"}


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"ready\n"
        yield popen
        popen.kill()


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pyuffd", "track", *map(str, words)]


def runs_free(pid: int) -> None:
    """It is alive, and nothing of it is registered."""
    with Process(pid) as process:
        assert not [m for m in process.mappings(details=True) if "uw" in m.flags]
        assert {thread.state for thread in process.threads()} <= {"R", "S"}


def test_json_and_a_picture(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    picture = tmp_path / "heat.png"
    words = command(writer.pid, "--json", "--interval", 0.2, "--seconds", 0.8, "--png", picture)
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=limit_s(LIMIT_S), check=True
    )
    rounds = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rounds) == 4
    for number, line in enumerate(rounds, 1):
        assert set(line) == KEYS
        assert line["seconds"] >= 0.2 * number - 0.01
        assert line["written_bytes"] >= 64 * 4096
        assert set(line["dirty_bytes"]) == {"1s", "10s", "60s"}
        assert line["dirty_bytes"]["60s"] >= line["written_bytes"]
        assert sum(part["written_bytes"] for part in line["mappings"]) == line["written_bytes"]
        assert line["blind_bytes"]["special"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs_free(writer.pid)


def test_plain_lines(writer: subprocess.Popen[bytes]) -> None:
    words = command(writer.pid, "--interval", 0.1, "--seconds", 0.2)
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=limit_s(LIMIT_S), check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"process {writer.pid}, wp-async: ")
    assert any(line.startswith("cannot be seen: special: ") for line in lines)
    assert sum("MiB/s  dirty" in line for line in lines) == 2


def test_a_table_on_a_terminal(writer: subprocess.Popen[bytes]) -> None:
    ours, theirs = pty.openpty()
    words = command(writer.pid, "--interval", 0.1, "--seconds", 0.3)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    popen = subprocess.Popen(words, stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # its end is closed
            break
        if not more:
            break
        text += more
    os.close(ours)
    assert popen.wait(limit_s(LIMIT_S)) == 0
    assert b"cannot be seen" in text
    assert b"written MiB" in text
    assert b"anonymous" in text


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_signals(writer: subprocess.Popen[bytes], number: int, status: int, tmp_path: Path) -> None:
    picture = tmp_path / "heat.png"
    words = command(writer.pid, "--json", "--interval", 0.05, "--png", picture)
    with subprocess.Popen(words, stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        for _ in range(2):
            assert json.loads(popen.stdout.readline())
        popen.send_signal(number)
        popen.stdout.read()
        assert popen.wait(limit_s(LIMIT_S)) == status
    assert (picture.stat().st_size > 0) == (number != signal.SIGKILL)
    runs_free(writer.pid)


def test_a_snapshot_that_a_lost_connection_ends(
    writer: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "pyuffd", "snapshot", str(writer.pid), "-o", f"{tmp_path}/a"]
    with subprocess.Popen([*words, "--rate", "0.5"], stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        wait_until("it copies", lambda: any(f.stat().st_size for f in tmp_path.glob(".a.*/pages")))
        popen.send_signal(signal.SIGHUP)
        assert popen.wait(limit_s(LIMIT_S)) == 129
    assert os.listdir(tmp_path) == []
    runs_free(writer.pid)


@pytest.mark.parametrize("verb", ["track", "core"])
def test_a_number_beyond_all_ids(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "9" * 20]) == 2
    assert "is not the id of a process" in capsys.readouterr().err


def test_a_closed_pipe(writer: subprocess.Popen[bytes]) -> None:
    words = command(writer.pid, "--json", "--interval", 0.05)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stderr is not None
        popen.stdout.readline()
        popen.stdout.close()
        assert popen.wait(limit_s(LIMIT_S)) == 141
        assert popen.stderr.read() == b""
    runs_free(writer.pid)


def test_the_end_of_the_target() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as target:
        assert target.stdout is not None
        target.stdout.readline()
        words = command(target.pid, "--json", "--interval", 0.05)
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as popen:
            assert popen.stdout is not None
            assert popen.stderr is not None
            popen.stdout.readline()
            target.kill()
            popen.stdout.read()
            assert popen.wait(limit_s(LIMIT_S)) == 0
            assert popen.stderr.read().decode() == f"pyuffd: process {target.pid} has ended\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["x"],
        ["0"],
        ["-1"],
        ["1", "--interval", "0"],
        ["1", "--top", "0"],
        ["1", "--seconds", "nan"],
    ],
)
def test_bad_arguments(words: list[str]) -> None:
    result = subprocess.run(
        command(*words), capture_output=True, text=True, timeout=limit_s(LIMIT_S)
    )
    assert result.returncode == 2
    assert "usage:" in result.stderr


def test_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(os.getpid())]) == 2
    assert capsys.readouterr().err.startswith("pyuffd: a process cannot track itself")


def test_no_such_process() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    result = subprocess.run(
        command(ended.pid), capture_output=True, text=True, timeout=limit_s(LIMIT_S)
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
