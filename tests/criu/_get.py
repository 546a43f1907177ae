"""Fetch CRIU from the Debian mirror that this machine's apt uses, into a cache folder.

Stable releases have versions that fail on newer kernels, and newer packages of CRIU need a newer
glibc. So this fetches CRIU from sid, with the libraries that it needs, and runs it with their
dynamic linker. apt runs with separate state in the cache folder; nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

SUITE = "sid"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
SCRIPT = """#!/bin/sh
root={root}
exec "$root/{libraries}/ld-linux-x86-64.so.2" --library-path "$root/{libraries}" \\
	"$root/usr/sbin/criu" "$@"
"""


class CriuNotFoundError(Exception):
    """CRIU is not available here; the text says why."""


def cache_dir() -> Path:
    """Return the folder for CRIU and apt's state."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyuffd" / "criu"


def cached() -> Path | None:
    """Return the path of the program that was fetched before, or None."""
    path = cache_dir() / "criu"
    return path if path.exists() else None


def fetch(*, refresh: bool = False) -> Path:
    """Return the path of the program, fetched unless the cache has it.

    Raises:
        CriuNotFoundError: apt is absent, names no Debian mirror, or the mirror lacks it.
    """
    found = cached()
    if found is not None and not refresh:
        return found
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise CriuNotFoundError(f"it comes from Debian packages, and there is no {program}")
    folder = cache_dir()
    packages = folder / "packages"
    for name in ("lists/partial", "cache/archives/partial", "packages/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    _apt(folder, "update")
    _apt(folder, "--no-install-recommends", "--download-only", "-y", "install", "criu")
    root = folder / "root.unpacking"
    shutil.rmtree(root, ignore_errors=True)
    for package in sorted(packages.glob("*.deb")):
        _run("dpkg-deb", "-x", str(package), str(root))
    shutil.rmtree(folder / "root", ignore_errors=True)
    root.rename(folder / "root")
    shutil.rmtree(packages)
    partial = folder / ".criu"
    partial.write_text(SCRIPT.format(root=folder / "root", libraries=LIBRARIES))
    partial.chmod(0o755)
    partial.rename(folder / "criu")
    return folder / "criu"


def _apt(folder: Path, *arguments: str) -> None:
    options = [
        f"Dir::Etc::sourcelist={folder}/sources.list",
        "Dir::Etc::sourceparts=/dev/null",
        "Dir::Etc::preferencesparts=/dev/null",
        f"Dir::State::lists={folder}/lists",
        "Dir::State::status=/dev/null",
        f"Dir::Cache={folder}/cache",
        f"Dir::Cache::archives={folder}/packages/",
        "APT::Architecture=amd64",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
        "Debug::NoLocking=1",
    ]
    _run("apt-get", "-q", *(word for option in options for word in ("-o", option)), *arguments)


def _mirror() -> str:
    form = "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)"
    listing = _run("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    for line in listing.splitlines():
        origin, label, uri = line.split("\t")
        if (origin, label) == ("Debian", "Debian"):
            return uri
    raise CriuNotFoundError(
        "this machine's apt sources name no Debian mirror (or `apt-get update` has not run)"
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CriuNotFoundError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    """Run `get-criu`."""
    parser = argparse.ArgumentParser(
        prog="get-criu",
        description="Print the path of a CRIU, fetched from the Debian mirror that this machine's"
        " apt uses. Exit status 1: none is available.",
    )
    parser.add_argument("--refresh", action="store_true", help="look for a newer version")
    try:
        print(fetch(refresh=parser.parse_args().refresh))
    except CriuNotFoundError as error:
        print(f"get-criu: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
