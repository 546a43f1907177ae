"""Debuggers open our cores, and see in them what they see in gcore's."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyuffd import Process, write_core
from pyuffd.testing import needs_privilege
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from tests._child import limit_s
from tests._gil import needs_gil
from tests.process._attach import status, wait_until
from tests.process._core import Target
from tests.process.test_core import program as program
from tests.process.test_track_process import needs_program

pytestmark = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
LIMIT_S = 60
THREADS = 4
BIN = Path(sys.executable).parent


@dataclass
class Written:
    target: Target
    path: Path
    tids: list[int]


@pytest.fixture(scope="module")
def stopped(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """A core of a target that a signal has stopped, so that every look at it sees the same."""
    target = Target.start(program, "threads", THREADS)
    wait_until("all threads wait", target.all_pause)
    target.popen.send_signal(signal.SIGSTOP)
    wait_until("it is stopped", lambda: status(target.pid)["State"][0] == "T")
    path = tmp_path_factory.mktemp("readers") / "core"
    with Process(target.pid) as process:
        write_core(process, path)
        tids = [thread.tid for thread in process.threads()]
    yield Written(target, path, tids)
    target.end()


def needs_module(name: str) -> pytest.MarkDecorator:
    """Skip where a module is not installed."""

    def missing() -> tuple[list[str], str]:
        return ([] if importlib.util.find_spec(name) else [name]), f"{name} is not installed"

    return marked(Need(name, missing))


def run(*words: object) -> str:
    result = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
        errors="replace",
    )
    assert result.returncode == 0, (words, result.stdout[-2000:], result.stderr[-2000:])
    return result.stdout


def gdb(program: object, core: object, *commands: str) -> list[str]:
    words = [word for command in commands for word in ("-ex", command)]
    text = run("gdb", "-batch", "-nx", *words, program, core)
    assert "warning" not in text
    return text.splitlines()


@needs_program("gdb")
@needs_program("gcore")
def test_gdb_sees_what_it_sees_in_a_core_of_gcore(stopped: Written, tmp_path: Path) -> None:
    target = stopped.target
    run("gcore", "-o", tmp_path / "theirs", target.pid)
    wait_until("it is stopped again", lambda: status(target.pid)["State"][0] == "T")
    commands = ("thread apply all -s bt", "thread apply all -s info registers", "print answer")
    found = [
        [line for line in gdb(target.program, core, *commands) if line.startswith(("#", "$", "r"))]
        for core in (stopped.path, tmp_path / f"theirs.{target.pid}")
    ]
    assert found[0] == found[1]
    text = "\n".join(found[0])
    assert len(re.findall(r"\bin last_step \(number=", text)) == THREADS + 1
    assert text.endswith("$1 = 4242")
    threads = gdb(target.program, stopped.path, "info threads")
    assert sum(f"(LWP {tid})" in line for line in threads for tid in stopped.tids) >= THREADS + 1


@needs_program("gdb")
def test_gdb_sees_vector_registers(program: str, tmp_path: Path) -> None:
    target = Target.start(program, "vector")
    try:
        wait_until("it is in its loop", target.vector_is_loaded)
        with Process(target.pid) as process:
            write_core(process, tmp_path / "core")
    finally:
        target.end()
    lines = gdb(program, tmp_path / "core", "print/x $ymm9.v4_int64", "bt")
    assert "$1 = {0x1111, 0x2222, 0x3333, 0x4444}" in lines
    assert any(line.startswith("#0") and " vector ()" in line for line in lines)


@needs_program("eu-stack")
def test_eu_stack(stopped: Written) -> None:
    """It reads first pages for build ids, and finds the vdso."""
    text = run("eu-stack", "--core", stopped.path, "--executable", stopped.target.program)
    for tid in stopped.tids:
        assert f"TID {tid}:" in text
    assert len(re.findall(r" last_step$", text, re.MULTILINE)) == THREADS + 1
    assert len(re.findall(r" first_step$", text, re.MULTILINE)) == THREADS + 1


@needs_program("eu-unstrip")
def test_eu_unstrip_finds_every_build_id(stopped: Written) -> None:
    text = run("eu-unstrip", "-n", "--core", stopped.path)
    for name in (stopped.target.program, "/libc.so.6", "linux-vdso.so.1"):
        (line,) = (line for line in text.splitlines() if name in line)
        assert re.match(r"0x[0-9a-f]+\+0x[0-9a-f]+ [0-9a-f]{40}@", line), line


@needs_program("readelf")
def test_readelf(stopped: Written) -> None:
    words = ["readelf", "--wide", "--file-header", "--program-headers", "--notes"]
    result = subprocess.run([*words, stopped.path], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    for kind in ("NT_PRSTATUS", "NT_FPREGSET", "NT_X86_XSTATE", "NT_SIGINFO"):
        assert result.stdout.count(f"\t{kind} ") == THREADS + 1, kind
    for kind in ("NT_PRPSINFO", "NT_AUXV", "NT_FILE"):
        assert result.stdout.count(f"\t{kind} ") == 1, kind


@needs_program("lldb")
def test_lldb(stopped: Written) -> None:
    commands = ("thread list", "thread backtrace all", "target variable answer")
    words = [word for command in commands for word in ("-o", command)]
    text = run(
        "lldb", "--batch", "--no-lldbinit", "--core", stopped.path, *words, stopped.target.program
    )
    assert len(re.findall(r"`last_step\(number=", text)) == THREADS + 1
    assert "answer = 4242" in text


DRGN = """
import contextlib, sys
import drgn
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
with contextlib.suppress(drgn.MissingDebugInfoError):
    prog.load_debug_info([sys.argv[2]], default=True)
print(prog["answer"].value_())
for thread in prog.threads():
    print(thread.tid, *[frame.name for frame in thread.stack_trace()])
"""


@needs_module("drgn")
def test_drgn(stopped: Written) -> None:
    first, *lines = run(
        sys.executable, "-c", DRGN, stopped.path, stopped.target.program
    ).splitlines()
    assert first == "4242"
    found = {int(tid): names for tid, *names in map(str.split, lines)}
    assert sorted(found) == sorted(stopped.tids)
    for names in found.values():
        assert {"last_step", "first_step"} <= set(names), found


PYTHON = """
import threading, time
def inner(event):
    event.wait()
def outer(event):
    inner(event)
event = threading.Event()
threads = [threading.Thread(target=outer, args=(event,), name=f"worker {i}") for i in range(2)]
for thread in threads:
    thread.start()
def main_function():
    print("ready", flush=True)
    time.sleep(10000)
main_function()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A core of a Python program."""
    folder = tmp_path_factory.mktemp("python")
    script = folder / "script.py"
    script.write_text(PYTHON)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"ready\n"
        with Process(popen.pid) as process:
            wait_until("it sleeps", lambda: {t.state for t in process.threads()} == {"S"})
            write_core(process, folder / "core")
        popen.kill()
    return folder / "core"


@needs_program(str(BIN / "pystack"))
def test_pystack_shows_python_stacks(python: Path) -> None:
    text = run(BIN / "pystack", "core", python)
    assert text.count(", in inner") == text.count(", in outer") == 2
    assert text.count(", in main_function") == 1
    assert "generated on demand" in text


@needs_program(str(BIN / "py-spy"))
@needs_gil(there=True)  # py-spy 0.4 does not know the objects of free-threaded Python
def test_py_spy_shows_python_stacks(python: Path) -> None:
    text = run(BIN / "py-spy", "dump", "--core", python)
    assert text.count("    inner (") == text.count("    outer (") == 2
    assert text.count("    main_function (") == 1
