"""Run tests with CRIU as the first process of a PID namespace, where all pids are free.

    unshare --pid --fork --mount-proc python -m tests.criu._namespace NAME JSON

calls a function of tests.criu._scenarios and prints what it returns as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from tests._child import limit_s
from tests.criu._get import cached

ROOT = Path(__file__).resolve().parents[2]


def criu_path() -> str | None:
    """Return the CRIU to be used: PYUFFD_CRIU, one in PATH, or the one that get-criu fetched."""
    fetched = cached()
    names = [os.environ.get("PYUFFD_CRIU"), shutil.which("criu"), fetched and str(fetched)]
    return next((name for name in names if name and _is_usable(name) is None), None)


@cache
def _is_usable(name: str) -> str | None:
    """Return None, or why this CRIU cannot be used here."""
    command = [name, "check", "--feature", "uffd-noncoop"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(60))
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and "is supported" in done.stdout:
        return None
    return (done.stderr or done.stdout).strip().partition("\n")[0]


def needs_criu() -> pytest.MarkDecorator:
    """Skip the test if no CRIU works, or a PID namespace cannot be made."""

    def missing() -> tuple[list[str], str]:
        if os.geteuid():
            return ["criu"], "CRIU needs root"
        if criu_path() is None:
            found = shutil.which("criu") or cached()
            why = f"{found}: {_is_usable(str(found))}" if found else "it is not installed"
            return ["criu"], f"{why} (tests/criu/get-criu fetches one)"
        done = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"])
        return ([], "") if done.returncode == 0 else (["criu"], "a PID namespace is refused")

    return marked(Need("CRIU", missing))


def in_namespace(name: str, *args: object, budget_s: float) -> Any:
    """Call a scenario in a new PID namespace, and return its result."""
    program = subprocess.Popen(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *(sys.executable, "-m", "tests.criu._namespace", name, json.dumps(args)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYUFFD_CRIU": criu_path() or ""},
    )
    try:
        out, _ = program.communicate(timeout=limit_s(budget_s))
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 0, f"{name} failed"
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    from tests.criu import _scenarios

    print(json.dumps(getattr(_scenarios, sys.argv[1])(*json.loads(sys.argv[2]))))
