"""A build that cannot succeed ends with one sentence that tells what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._child import ROOT, limit_s

pytestmark = pytest.mark.package

# Change what setup.py finds, then run it as a build front end would.
RUN_SETUP = """
import platform, runpy, setuptools, sys, sysconfig
{change}
sys.argv = ["setup.py", "--quiet", "egg_info", "--egg-base", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def build(egg_base: Path, change: str = "", **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN_SETUP.format(change=change), str(egg_base)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=limit_s(60),
    )
    return done.returncode, done.stderr


def assert_one_sentence(stderr: str, *words: str) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("pyuffd ")
    assert line.endswith(".")
    for word in words:
        assert word in line


def test_a_complete_machine_builds(tmp_path: Path) -> None:
    status, stderr = build(tmp_path)
    assert status == 0, stderr
    assert (tmp_path / "pyuffd.egg-info").is_dir()


def test_no_compiler(tmp_path: Path) -> None:
    status, stderr = build(tmp_path, PATH=str(tmp_path))
    assert status == 1
    assert_one_sentence(stderr, "C compiler", "gcc", "python3-dev")


def test_no_python_headers(tmp_path: Path) -> None:
    change = f"sysconfig.get_path = lambda name, *args, **kwargs: {str(tmp_path)!r}"
    status, stderr = build(tmp_path, change)
    assert status == 1
    assert_one_sentence(stderr, "no Python.h", str(tmp_path), "python3-dev")


def test_compiler_without_c_library_headers(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: sys/mman.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    status, stderr = build(tmp_path, CC=str(compiler))
    assert status == 1
    assert_one_sentence(stderr, "sys/mman.h", "libc6-dev")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("platform.machine = lambda: 'aarch64'", "aarch64 linux"),
        ("sys.platform = 'darwin'", "x86_64 darwin"),
        ("sys.maxsize = 2**31 - 1", "32-bit Python"),
    ],
    ids=["cpu", "system", "32-bit"],
)
def test_unsupported_platform(tmp_path: Path, change: str, found: str) -> None:
    status, stderr = build(tmp_path, change)
    assert status == 1
    assert_one_sentence(stderr, "x86-64 Linux only", found)
