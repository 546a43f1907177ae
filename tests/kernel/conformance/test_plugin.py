"""The plugin on cases made for the purpose: failures, a stall, a kernel that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd.conformance import Report
from pyuffd.conformance.plugin import SUITE

CASES = '''
import os, signal, threading
import pyuffd.conformance.cases
from pyuffd import Feature, RegisterMode
from pyuffd.conformance import Variant, case, plugin
from pyuffd.conformance._kmsg import Record
from pyuffd.conformance._need import Need

pyuffd.conformance.cases.MODULES = ()

@case("t.good", origin="x", memory=["anon", "shmem"], variants=[Variant("v", "seen")])
def good(ctx):
    """Pass."""
    ctx.expect_variant("one", 1, v=1)

@case("t.letters", origin="x", memory=["anon"])
def bad(ctx):
    """Expect protection."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    ctx.expect_pagemap(region.start, "P--WX")

@case("t.message", origin="x", memory=["anon"])
def silent(ctx):
    """Expect no message."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.silently(ctx.write, region.start, b"1")

@case("t.errno", origin="x", memory=["anon"])
def errno_(ctx):
    """Expect EEXIST."""
    ctx.open()
    ctx.expect_errno(17, ctx.uffd.register, 0, 4096)

@case("t.lack", origin="x", memory=["any"], needs=[Need("a hat", lambda: (["hat"], "none here"))])
def lack(ctx):
    """Need what is not there."""

@case("t.stall", origin="x", memory=["anon"], budget_s=1)
def stall(ctx):
    """Fault where nobody answers."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    region.memoryview()[0]

class Log:
    """A kernel log that has a warning after t.good.shmem."""

    readable = True
    count = 0

    def read(self):
        Log.count += 1
        text = "WARNING: CPU: 0 PID: 1 at mm/x.c:1"
        return [Record(7, 0, 4, text)] if Log.count == 2 and "broken" in os.environ else []

    def close(self):
        pass

plugin.Kmsg = Log
'''


def run(
    folder: Path, *args: str, status: int, env: dict[str, str] | None = None
) -> tuple[Report, str]:
    """Run cases of the purpose; return the report and the output."""
    (folder / "conftest.py").write_text(CASES)
    (folder / "test_it.py").write_text("from pyuffd.conformance.test_suite import test\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    clean.pop("PYUFFD_TESTS", None)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "pyuffd.conformance.plugin"),
            *("-p", "no:cacheprovider", "--uffd-report=r.json", "test_it.py", *args),
        ],
        cwd=folder,
        env={**clean, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stdout
    return Report.read(folder / "r.json"), done.stdout


def test_outcomes_variant_and_what_was_seen(tmp_path: Path) -> None:
    made, output = run(tmp_path, "-k", "not stall", status=1)
    outcomes = {name: result.outcome for name, result in made.results.items()}
    assert outcomes == {
        "t.good.anon": "passed",
        "t.good.shmem": "passed",
        "t.letters.anon": "failed",
        "t.message.anon": "failed",
        "t.errno.anon": "failed",
        "t.lack.any": "skipped",
    }
    assert made.results["t.good.anon"].variant == "v"
    assert "saw P---X, expected P--WX" in made.results["t.letters.anon"].text
    assert "message 1 " in made.results["t.message.anon"].text
    assert "saw EINVAL (UffdOSError), expected EEXIST" in made.results["t.errno.anon"].text
    assert f"feature mask {made.features:#x}" in made.results["t.errno.anon"].text
    assert made.results["t.lack.any"].text == "needs a hat; none here"
    assert "skipped 1: needs a hat; none here" in output
    assert made.messages == []


@pytest.mark.parametrize(("allowed", "outcome"), [("", "failed"), ("hat", "skipped")])
def test_require_turns_a_skip_into_a_failure_unless_it_is_allowed(
    tmp_path: Path, allowed: str, outcome: str
) -> None:
    env = {"PYUFFD_TESTS": "require", "PYUFFD_TESTS_MAY_LACK": allowed}
    made, _ = run(tmp_path, "-k", "lack", status=int(outcome == "failed"), env=env)
    assert made.results["t.lack.any"].outcome == outcome


def test_stall_ends_its_worker_only(tmp_path: Path) -> None:
    made, output = run(tmp_path, "-n", "1", "-k", "good or stall", status=1)
    assert made.results["t.stall.anon"].outcome == "failed"
    assert made.results["t.good.shmem"].outcome == "passed"
    assert "conftest.py" in output, output
    assert "in stall" in output


def test_broken_kernel_fails_the_run_and_names_the_case(tmp_path: Path) -> None:
    made, output = run(tmp_path, "-k", "good", status=1, env={"broken": "1"})
    assert [message.tests for message in made.fatal] == [["t.good.shmem"]]
    assert made.counts()["passed"] == 2
    assert "kernel BROKEN: WARNING: CPU: 0" in output
    assert "t.good.shmem ran" in output
    assert "mm/x.c:1" in (tmp_path / "r.html").read_text()


def test_installed_suite_is_what_the_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyuffd", "conformance", "run", "-k", "api-syscall"],
        cwd=SUITE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 0 failed" in done.stdout
