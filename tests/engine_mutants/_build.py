"""A copy of the sources with or without a mutant, its extension, and runs of its tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from xml.etree import ElementTree

from pyuffd.testing._run import wait_for_end
from tests.engine_mutants._mutants import ROOT, Mutant

BUILDS = ROOT / "build/engine-mutants"
UNMODIFIED = "unmodified"
COPIED = ("csrc", "src", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# If a mutant hangs, its test waits until the limit: half of the usual limit is enough.
SCALE = 0.5
# Each test runs in a child with a shorter limit. pytest itself takes this long only on a busy
# machine, which says nothing about the mutant.
TEST_LIMIT_S = 60.0 * max(1.0, float(os.environ.get("PYUFFD_BUDGET_SCALE", "1")))


class RunError(Exception):
    """The copy does not build, or a test cannot be run."""


@dataclass(frozen=True)
class Run:
    """One run of some tests: how each one ended ("passed", "failed", "hung", "skipped")."""

    ended: dict[str, str]
    wall_s: float


def compiler() -> dict[str, str]:
    """Return the environment of a build. With ccache, a mutant compiles only one file."""
    if "CC" in os.environ or shutil.which("ccache") is None:
        return dict(os.environ)
    # The copies are in different folders, whose names would be in the debug information.
    cache = {"CCACHE_DIR": str(BUILDS / "ccache"), "CCACHE_NOHASHDIR": "1"}
    return {**os.environ, **cache, "CC": "ccache cc"}


class Build:
    """A copy of the sources with one mutant, or with none."""

    def __init__(self, mutant: Mutant | None) -> None:
        self.folder = BUILDS / (mutant.name if mutant else UNMODIFIED)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("*.so", "*.o", "*.egg-info", "__pycache__")
                shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, self.folder)
        if mutant:
            mutant.apply(self.folder)
        if mutant is None or mutant.in_c:
            self._compile()
        else:
            for built in (BUILDS / UNMODIFIED / "src/pyuffd").glob("_shim*.so"):
                shutil.copy(built, self.folder / "src/pyuffd")
        self._check()

    def _compile(self) -> None:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=self.folder, env=compiler(), capture_output=True, text=True
        )
        if done.returncode:
            raise RunError(f"{self.folder.name} does not build:\n{done.stderr[-2000:]}")

    def _check(self) -> None:
        command = [sys.executable, "-c", "import pyuffd._shim as s; print(s.__file__)"]
        found = subprocess.run(command, env=self._env(), capture_output=True, text=True)
        if not found.stdout.startswith(str(self.folder)):
            raise RunError(f"{self.folder.name}: the tests would run with {found.stdout.strip()}")

    def _env(self) -> dict[str, str]:
        scale = float(os.environ.get("PYUFFD_BUDGET_SCALE", "1")) * SCALE
        python_path = str(self.folder / "src")
        return {**os.environ, "PYTHONPATH": python_path, "PYUFFD_BUDGET_SCALE": str(scale)}

    def pytest(self, *arguments: str, limit_s: float = TEST_LIMIT_S) -> tuple[bool, str]:
        """Run pytest in a new session; return whether it ended in time, and its output."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
        output = self.folder / "output.txt"
        with output.open("w+") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._env(), stdout=file, stderr=file, start_new_session=True
            )
            try:
                ended = wait_for_end(process.pid, limit_s)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
                process.wait()
        return ended, output.read_text(errors="replace")

    def run(self, tests: dict[str, str]) -> Run:
        """Run tests by their nodes' names."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        began = time.monotonic()
        limit_s = TEST_LIMIT_S * len(tests)
        by_itself, output = self.pytest(f"--junitxml={report}", *tests.values(), limit_s=limit_s)
        wall_s = time.monotonic() - began
        if not by_itself:
            raise RunError(f"{self.folder.name}: pytest did not end within {limit_s:.0f} s")
        ended = {}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            text = "".join(part.get("message", "") + (part.text or "") for part in case)
            kinds = {part.tag for part in case}
            how = "hung" if ", out of time" in text else "failed"
            how = how if kinds & {"failure", "error"} else "passed"
            ended[id_of(case.get("name", ""))] = "skipped" if "skipped" in kinds else how
        if missing := tests.keys() - ended.keys():
            raise RunError(f"{self.folder.name}: {missing} did not run:\n{output[-2000:]}")
        return Run(ended, wall_s)


def id_of(node: str) -> str:
    return node.rpartition("[")[2].rstrip("]")
