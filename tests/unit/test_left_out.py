"""The sentence at the end of a test run about the tests that it left out."""

from __future__ import annotations

import errno
import os
import re
import shutil

import pytest

from pyuffd import Feature, Ioctl, KernelSupport, PageCategory
from pyuffd._probe import OpenSupport
from tests import _left_out, conftest

YES = OpenSupport(True)
NO_PRIVILEGE = OpenSupport(False, errno.EPERM, "no CAP_SYS_PTRACE", "sysctl vm.unprivileged=1")
FILTERED = OpenSupport(False, errno.EPERM, "a seccomp filter", "docker run --security-opt")
NO_KERNEL = OpenSupport(False, errno.ENOSYS, "this kernel is built without it")
CLOSED = OpenSupport(False, errno.EACCES, "it is crw-------", "chown 1000 /dev/userfaultfd")


def support(syscall: OpenSupport, device: OpenSupport, user_mode: OpenSupport) -> KernelSupport:
    return KernelSupport(
        release="6.1",
        features=Feature(0),
        refused=Feature(0),
        ioctls=Ioctl(0),
        opens={"syscall": syscall, "device": device, "user_mode_only": user_mode},
        memory={},
        scan_categories=PageCategory(0),
    )


ALL = support(YES, YES, YES)
DEVICE_ALONE = support(FILTERED, YES, FILTERED)
USER_MODE = support(NO_PRIVILEGE, CLOSED, YES)
CONTAINER = support(FILTERED, CLOSED, FILTERED)
OTHER_KERNEL = support(NO_KERNEL, NO_KERNEL, NO_KERNEL)

USER_CODE_ONLY = "here userfaultfd handles only the faults of user code (no CAP_SYS_PTRACE)"
NONE = "no userfaultfd can be opened here"
LACKING = "the kernel, this user or the machine lack what they need"


@pytest.mark.parametrize(
    ("found", "uid", "sudo", "why", "command"),
    [
        pytest.param(ALL, 0, True, LACKING, "", id="root"),
        pytest.param(ALL, 1000, True, LACKING, "sudo make test", id="sysctl-is-1"),
        pytest.param(DEVICE_ALONE, 0, True, LACKING, "", id="device-alone"),
        pytest.param(USER_MODE, 1000, True, USER_CODE_ONLY, "sudo make test", id="user"),
        pytest.param(USER_MODE, 1000, False, USER_CODE_ONLY, "make test, as root", id="no-sudo"),
        pytest.param(USER_MODE, 0, True, USER_CODE_ONLY, NO_PRIVILEGE.command, id="user-namespace"),
        pytest.param(
            CONTAINER, 0, True, f"{NONE} (a seccomp filter)", FILTERED.command, id="container"
        ),
        pytest.param(
            CONTAINER, 1000, True, f"{NONE} (a seccomp filter)", FILTERED.command, id="both"
        ),
        pytest.param(OTHER_KERNEL, 0, True, f"{NONE} ({NO_KERNEL.reason})", "", id="no-kernel"),
    ],
)
def test_one_sentence_says_how_much_why_and_what_would_run_it(
    found: KernelSupport,
    uid: int,
    sudo: bool,
    why: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if sudo else None)
    wanted = f"Left out 1,920 of 6,971 tests: {why}" + (f"; to run all: {command}" * bool(command))
    assert _left_out.left_out(1920, 5051, found) == wanted


def test_it_is_asked_of_this_process() -> None:
    assert re.match(r"Left out 1 of 3 tests: .", _left_out.left_out(1, 2))


class Reporter:
    """The part of pytest's reporter that pytest_terminal_summary uses."""

    def __init__(self, skipped: list[str], passed: int) -> None:
        reports = [type("Report", (), {"longrepr": ("file", 1, reason)}) for reason in skipped]
        self.stats = {"skipped": reports, "passed": [object()] * passed}
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def write_line(self, line: str) -> None:
        self.lines.append(line)


def summary(reporter: Reporter) -> list[str]:
    conftest.pytest_terminal_summary(reporter)  # type: ignore[arg-type]
    return reporter.lines


def test_the_summary_counts_by_reason_and_ends_with_the_sentence() -> None:
    lines = summary(Reporter(["Skipped: needs A; none", "Skipped: needs B", "needs A; none"], 7))
    assert lines[:3] == ["skipped, by reason", "    2 needs A; none", "    1 needs B"]
    assert lines[-1].startswith("Left out 3 of 10 tests: ")


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    assert summary(Reporter([], 7)) == []
