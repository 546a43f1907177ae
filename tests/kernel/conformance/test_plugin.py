"""The plugin with cases made for these tests: failures, a stall, a broken kernel."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pyuffd.conformance import Report
from pyuffd.conformance.plugin import NOTHING_CHECKED, SUITE
from tests._child import limit_s

# Several processes start, one of which stalls; on a busy machine that needs a minute.
LIMIT_S = 180
CASES = '''
import pytest
import os, signal, threading
import pyuffd.conformance.cases
from pyuffd import Feature, RegisterMode
from pyuffd.conformance import Variant, case, plugin
from pyuffd.conformance._kmsg import Record
from pyuffd.testing._need import Need

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

@case("t.pages", origin="x", memory=["anon"])
def pages(ctx):
    """Expect another page."""
    region = ctx.make(3)
    ctx.expect("address", region.start + 2 * ctx.page, region.start + ctx.page)

@case("t.many", origin="x", memory=["any"])
def many(ctx):
    """Expect no pages."""
    ctx.expect("pages", list(range(1, 16)), "none")

@case("t.alike", origin="x", memory=["any"], variants=[Variant("a", "x"), Variant("b", "x")])
def alike(ctx):
    """Expect variants that show the same."""
    ctx.expect_variant("errno", 3, a=1, b=1)

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

if "own-log" not in os.environ:
    plugin.Kmsg = Log
'''

# A program's lines have another facility than the kernel's; otherwise they look the same.
OWN_LOG = (
    CASES
    + '''
from pyuffd.conformance import _kmsg

_kmsg.KERNEL = 1  # LOG_USER

def warn(where):
    with open("/dev/kmsg", "w") as log:
        log.write(f"<12>WARNING: CPU: 0 PID: {os.getpid()} at mm/x.c:1 {where}+0x1/0x2\\n")

@case("t.warns", origin="x", memory=["anon", "shmem"])
def warns(ctx):
    """Make the kernel say that it is broken, on one memory type."""
    if ctx.memory.name == "shmem":
        warn("warns")

@case("t.noisy", origin="x", memory=["anon"], alone=True, noisy=True)
def noisy(ctx):
    """Make it warn of what does not matter, and of what does."""
    with open("/dev/kmsg", "w") as log:
        log.write("<12>python invoked oom-killer\\n")
    if "broken" in os.environ:
        warn("noisy")

@pytest.fixture(autouse=True)
def late():
    yield
    if "late" in os.environ:
        warn("late")
'''
)


TALK = "pages or many or alike"  # whose failures are about words

needs_kernel_log = pytest.mark.skipif(
    not os.access("/dev/kmsg", os.W_OK), reason="needs a /dev/kmsg that can be written"
)


def run(
    folder: Path, *args: str, status: int, env: dict[str, str] | None = None, cases: str = CASES
) -> tuple[Report, str]:
    """Run cases made for these tests; return the report and the output."""
    (folder / "conftest.py").write_text(cases)
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
        timeout=limit_s(LIMIT_S),
    )
    assert done.returncode == status, done.stdout
    return Report.read(folder / "r.json"), done.stdout


def test_outcomes_variant_and_what_was_seen(tmp_path: Path) -> None:
    made, output = run(tmp_path, "-k", f"not ({TALK} or stall)", status=1)
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


# Every case needs a userfaultfd first, which another user may not have.
@pytest.mark.parametrize(
    ("allowed", "outcome"), [("", "failed"), ("hat userfaultfd", "skipped")], ids=["none", "hat"]
)
def test_require_turns_a_skip_into_a_failure_unless_it_is_allowed(
    tmp_path: Path, allowed: str, outcome: str
) -> None:
    env = {"PYUFFD_TESTS": "require", "PYUFFD_TESTS_MAY_LACK": allowed}
    made, _ = run(tmp_path, "-k", "lack", status=int(outcome == "failed"), env=env)
    assert made.results["t.lack.any"].outcome == outcome


def test_require_holds_where_plugins_are_not_loaded_by_themselves(tmp_path: Path) -> None:
    env = {"PYUFFD_TESTS": "require", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    made, _ = run(tmp_path, "-k", "lack", status=1, env=env)
    assert made.results["t.lack.any"].outcome == "failed"


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


def run_with_log(folder: Path, *args: str, status: int, **env: str) -> tuple[Report, str]:
    """Run cases that write to the real log, to which nothing else may write meanwhile."""
    with Path(tempfile.gettempdir(), "pyuffd-own-log.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run(folder, *args, status=status, env={"own-log": "", **env}, cases=OWN_LOG)


@needs_kernel_log
@pytest.mark.parametrize("workers", ["0", "2"])
def test_warning_in_the_log_fails_the_run_and_names_the_case(tmp_path: Path, workers: str) -> None:
    made, output = run_with_log(tmp_path, "-n", workers, "-k", "t.warns", status=1)
    (message,) = made.fatal
    assert "t.warns.shmem" in message.tests
    assert set(message.tests) <= {"t.warns.shmem", "t.warns.anon"}  # which may run at the same time
    assert made.counts()["passed"] == 2
    assert "kernel BROKEN: WARNING: CPU: 0" in output


@needs_kernel_log
def test_warning_that_comes_late_fails_the_run(tmp_path: Path) -> None:
    made, output = run_with_log(tmp_path, "-k", "t.warns.anon", status=1, late="")
    assert [message.tests for message in made.fatal] == [[]]
    assert "late+0x1/0x2 (between cases)" in output


@needs_kernel_log
@pytest.mark.parametrize(("env", "fatal"), [({}, []), ({"broken": ""}, [["t.noisy.anon"]])])
def test_noisy_case_may_cause_warnings_but_no_warn(
    tmp_path: Path, env: dict[str, str], fatal: list[list[str]]
) -> None:
    made, _ = run_with_log(tmp_path, "-k", "t.noisy", status=int(bool(fatal)), **env)
    assert [message.tests for message in made.fatal] == fatal
    assert len(made.messages) == len(fatal)


def test_installed_suite_is_what_the_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyuffd", "conformance", "run", "-k", "api-syscall"],
        cwd=SUITE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 0 failed" in done.stdout


def test_run_command_without_a_case_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyuffd", "conformance", "run", "-k", "no-such-case"],
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert done.returncode == 5
    assert "no case matches -k 'no-such-case'" in done.stderr


def test_report_in_a_folder_that_is_not_there_is_refused_first(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "pyuffd.conformance.plugin"),
            *("-p", "no:cacheprovider", "--uffd-report=none/r", str(SUITE)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert done.returncode == 4
    assert "--uffd-report=none/r: there is no such folder" in done.stderr


def test_a_run_that_checked_nothing_is_no_success(tmp_path: Path) -> None:
    made, _ = run(tmp_path, "-k", "lack", "--uffd-nonempty", status=NOTHING_CHECKED)
    assert set(made.counts()) == {"skipped"}
    run(tmp_path, "-k", "lack or good", "--uffd-nonempty", status=0)
    run(tmp_path, "-k", "lack", status=0)


def test_failures_speak_of_pages_and_name_each_alternative_once(tmp_path: Path) -> None:
    made, _ = run(tmp_path, "-k", TALK, status=1)
    texts = {name: result.text for name, result in made.results.items()}
    assert "saw page 2, expected page 1" in texts["t.pages.anon"]
    assert "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ... and 5 more], expected none" in texts["t.many.any"]
    assert "saw 3, expected 1 (a, b)" in texts["t.alike.any"]
