"""The built wheel: its tag, its content, and that it works in a clean environment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyuffd
from tests._child import ROOT, limit_s

pytestmark = pytest.mark.package

VERSION = pyuffd.__version__
PROBE = """
import pyuffd
assert pyuffd.__version__ == {version!r}, pyuffd.__version__
from pyuffd import _shim
assert _shim.__file__.endswith(".abi3.so"), _shim.__file__
with pyuffd.Userfaultfd(user_mode_only=True) as uffd:
    print(int(uffd.supported))
"""


def clean_environment() -> dict[str, str]:
    dropped = {"PYTHONPATH", "LD_PRELOAD", "PYUFFD_SANITIZE"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "CFLAGS": "-O1"}  # what is built matters here, not how fast it runs


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s(120),
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextlib.contextmanager
def once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Yield a folder that all processes of xdist share, and whether this one must fill it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not folder.exists()


def copy_source(copy: Path) -> None:
    """Copy the files that a build reads, so that it does not change the tree."""
    copy.mkdir()
    skipped = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "*.egg-info")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with once(tmp_path_factory, "source") as (source, empty):
        if empty:
            copy_source(source)
            # Use the build tools of this environment, so that nothing is downloaded.
            options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", "dist")
            run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and only the run-time dependencies of this one."""
    with once(tmp_path_factory, "installed") as (folder, empty):
        python = folder / "bin" / "python"
        if empty:
            venv.create(folder, with_pip=False, symlinks=True)
            run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel)
    return python


def test_tag_is_the_stable_abi(wheel: Path) -> None:
    assert wheel.name == f"pyuffd-{VERSION}-cp311-abi3-linux_x86_64.whl"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    modules = {"_pyuffd_command.py", "_pyuffd_pytestplugin.py"}
    assert top == {"pyuffd", *modules, f"pyuffd-{VERSION}.dist-info"}
    assert {"pyuffd/_shim.abi3.so", "pyuffd/_shim.pyi", "pyuffd/py.typed"} <= set(names)
    sources = {
        f"pyuffd/{path.relative_to(ROOT / 'src' / 'pyuffd').as_posix()}"
        for path in (ROOT / "src" / "pyuffd").rglob("*.py")
    }
    assert sources <= set(names)


def test_the_runtime_dependency_is_cffi(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"pyuffd-{VERSION}.dist-info/METADATA").decode()
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(name.partition(">")[0] for name in required) == ["cffi"]


def test_installed_wheel_opens_a_userfaultfd(python: Path, tmp_path: Path) -> None:
    output = run(python, "-I", "-W", "error", "-c", PROBE.format(version=VERSION), cwd=tmp_path)
    assert int(output) & 1 << 5, "missing faults on shmem are in every kernel since 4.11"


def test_installed_command_runs(python: Path, tmp_path: Path) -> None:
    assert VERSION in run(python.parent / "pyuffd", "--version", cwd=tmp_path)
