"""`pyuffd doctor` as a program: as root, as nobody, under seccomp, on a terminal, in a pipe."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyuffd.cli import main
from pyuffd.testing import needs_privilege
from tests._child import ROOT, limit_s, run_child
from tests.seccomp_deny import NR_USERFAULTFD, deny_call

DEVICE = "/dev/userfaultfd"
NOBODY = 65534
TIMEOUT_S = 60

KEY = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
MEMORY_TYPES = {"anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private"}
WAYS = {"syscall", "device", "user_mode_only"}
MODES = {"MISSING", "WP", "MINOR", "RWP"}

_PR_SET_DUMPABLE = 4

unprivileged_sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd")


def keys_of(value: object, prefix: str = "") -> set[str]:
    """Return the key paths of printed JSON, in the notation of docs/doctor.md."""
    if isinstance(value, dict):
        named = {frozenset(WAYS): "<way>", frozenset(MEMORY_TYPES): "<type>"}
        named[frozenset(MODES)] = "<mode>"
        placeholder = named.get(frozenset(value))
        return {
            key
            for name, inner in value.items()
            for key in keys_of(inner, f"{prefix}.{placeholder or name}" if prefix else name)
        }
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {key for inner in value for key in keys_of(inner, f"{prefix}[]")}
    return {prefix}


def doctor(*arguments: str, user: int | None = None, seccomp_errno: int | None = None) -> int:
    """Run the command in this process, after dropping what the arguments name."""
    if user is not None:
        # Import them while their files can be read.
        for module in ("pyuffd._probe", "pyuffd.cli.doctor"):
            importlib.import_module(module)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # After a change of user root owns /proc/self until the next execve.
        prctl(_PR_SET_DUMPABLE, 1)
    if seccomp_errno is not None:
        deny_call(NR_USERFAULTFD, seccomp_errno)
    return main(["doctor", *arguments])


def prctl(option: int, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *arguments, *[0] * (4 - len(arguments))):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def report(**how: Any) -> tuple[int, dict[str, Any]]:
    """Return exit status and JSON of the command, run in a child."""
    child = run_child(doctor, "--json", budget_s=TIMEOUT_S, **how)
    found = json.loads(child.stdout)
    assert isinstance(found, dict)
    return child.value, found


def page(**how: Any) -> str:
    return run_child(doctor, budget_s=TIMEOUT_S, **how).stdout


def test_printed_keys_are_the_documented_ones() -> None:
    _, found = report()
    documented = set(KEY.findall((ROOT / "docs" / "doctor.md").read_text()))
    # An empty list shows nothing about its elements.
    printed = keys_of(found)
    for name in ("huge_pages", "missing"):
        if not found[name]:
            printed.remove(name)
            printed |= {key for key in documented if key.startswith(f"{name}[]")}
    assert printed == documented
    assert found["schema"] == 1


@needs_privilege("CAP_SYS_PTRACE")
def test_privileged_user_can_use_everything() -> None:
    status, found = report()
    assert status == 0
    assert (found["usable"], found["kernel_faults"]) == (True, True)
    assert found["open"]["syscall"] == {
        "works": True,
        "errno": None,
        "reason": None,
        "command": None,
    }
    assert found["features"]["refused"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nobody_is_told_what_is_left_and_how_to_have_more() -> None:
    status, found = report(user=NOBODY)
    assert status == 0
    ways = found["open"]
    assert found["user"]["uid"] == NOBODY
    assert found["user"]["capabilities"] == []
    assert ways["user_mode_only"]["works"]
    allowed = unprivileged_sysctl.read_text().strip() == "1"
    assert ways["syscall"]["works"] == allowed
    if not allowed:
        assert ways["syscall"]["errno"] == "EPERM"
        assert ways["syscall"]["command"] == "sysctl vm.unprivileged_userfaultfd=1"
    if os.path.exists(DEVICE) and not os.stat(DEVICE).st_mode & 0o006:
        assert ways["device"]["errno"] == "EACCES"
        assert DEVICE in ways["device"]["command"]
        assert found["kernel_faults"] == allowed
    # A feature of the kernel that this user does not get.
    assert found["features"]["refused"] == ["EVENT_FORK"]
    assert any(
        entry["what"] == "EVENT_FORK" and "sys_ptrace" in entry["command"]
        for entry in found["missing"]
    )
    assert found["memory_types"]["anon"]["MISSING"]["works"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_page_for_nobody_fits_and_names_the_commands() -> None:
    _, found = report(user=NOBODY)
    text = page(user=NOBODY)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    flat = text.replace(" \\\n", " ")
    for entry in found["missing"]:
        if entry["command"]:
            assert " ".join(entry["command"].split()) in " ".join(flat.split())


@pytest.mark.parametrize("code", [1, 38], ids=["EPERM", "ENOSYS"])
def test_seccomp_filter_is_named(code: int) -> None:
    _, found = report(seccomp_errno=code)
    for way in ("syscall", "user_mode_only"):
        assert not found["open"][way]["works"]
        assert "seccomp" in found["open"][way]["reason"]
        assert "seccomp" in found["open"][way]["command"]
    assert found["user"]["seccomp_filter"]
    assert found["usable"] == os.access(DEVICE, os.R_OK | os.W_OK)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_exit_status_1_and_a_whole_report_where_nothing_opens() -> None:
    if os.path.exists(DEVICE) and os.stat(DEVICE).st_mode & 0o006:
        pytest.skip(f"{DEVICE} is open to everybody")
    status, found = report(user=NOBODY, seccomp_errno=1)
    assert status == 1
    assert not found["usable"]
    assert found["features"]["mask"] == "0x0"
    assert found["features"]["missing"] == []
    modes = [mode for modes in found["memory_types"].values() for mode in modes.values()]
    assert {mode["errno"] for mode in modes} == {"EPERM"}
    child = run_child(doctor, user=NOBODY, seccomp_errno=1, budget_s=TIMEOUT_S)
    assert child.value == 1
    assert "userfaultfd cannot be used here." in child.stdout


def on_terminal(**environment: str) -> bytes:
    """Return what the command writes to a terminal."""
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyuffd", "doctor"],
            stdout=follower,
            env={**inherited, "TERM": "xterm", **environment},
        )
        os.close(follower)
        follower = -1
        written = b""
        while True:
            try:
                read = os.read(leader, 4096)
            except OSError:  # EIO: the last writer has closed it
                break
            if not read:
                break
            written += read
        process.wait(limit_s(TIMEOUT_S))
        return written
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)


def test_colours_on_a_terminal_unless_told_not_to() -> None:
    assert b"\x1b[1m" in on_terminal()
    assert b"\x1b" not in on_terminal(NO_COLOR="1")


def test_reader_of_the_output_is_gone() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyuffd", "doctor"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            timeout=limit_s(TIMEOUT_S),
            check=False,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")
