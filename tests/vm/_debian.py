"""Fetch released kernels and their source from the Debian mirror that this machine's apt uses.

apt runs with separate state under the cache folder, so the machine's lists, sources and pins do not
change; it checks signatures and checksums. Nothing is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cmp_to_key
from pathlib import Path

# The suites that hold kernels. Debian has no 5.15, and no 6.2 to 6.11.
ARCHIVE_SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
SECURITY_SUITES = ("bullseye-security", "bookworm-security", "trixie-security")
SECURITY_LABEL = "Debian-Security"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# A cloud kernel has NVMe and hugetlbfs built in and needs no modules here. From 6.19 on
# linux-image-* only depends on the linux-binary-* that has the kernel in it.
_IMAGE_PATTERN = r"^linux-(image|binary)-[0-9].*-cloud-amd64$"
_VERSION = re.compile(r"[0-9]+\.[0-9]+(\.[0-9]+)*")


class KernelNotFoundError(Exception):
    """No such kernel is available here; the text says why."""


@dataclass(frozen=True)
class Package:
    """One version of a package, as `apt-cache madison` lists it."""

    name: str
    version: str

    @property
    def upstream(self) -> str:
        """The kernel version in the package version."""
        match = _VERSION.match(self.version)
        return match[0] if match else ""


def cache_dir() -> Path:
    """Return the folder that keeps kernels, source trees and apt's state."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyuffd" / "kernels"


def kernel(version: str, *, refresh: bool = False) -> Path:
    """Return the path of a released kernel, fetched unless the cache has it.

    Args:
        version: a release series ("6.12") or one release ("6.12.117").
        refresh: look for a newer release of the series even if one is cached.

    Raises:
        KernelNotFoundError: apt is absent, names no Debian mirror, or the mirror lacks it.
    """
    folder = cache_dir() / "released" / _checked(version)
    if not refresh and (found := _cached(folder)):
        return found
    with _apt() as apt:
        if not refresh and (found := _cached(folder)):
            return found
        return _fetched(apt, version, folder)


def _cached(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("vmlinuz-*"))), None)


def _fetched(apt: _Apt, version: str, folder: Path) -> Path:
    package = apt.newest(version, apt.names(_IMAGE_PATTERN), _has_kernel)
    found = None
    with apt.downloaded(package) as archive:
        for name, data in _members(archive, re.compile(r".*/vmlinuz[^/]*")):
            found = folder / f"vmlinuz-{_release(package, name)}"
            _replace(folder, found, data)
    if found is None:
        raise KernelNotFoundError(f"{package.name} {package.version} has no vmlinuz in it")
    return found


def source(series: str, *, refresh: bool = False) -> Path:
    """Return the unpacked source tree of a release series, fetched unless the cache has it.

    Raises:
        KernelNotFoundError: as for `kernel`.
    """
    tree = cache_dir() / "source" / f"linux-source-{_checked(series)}"
    if (tree / "Makefile").exists() and not refresh:
        return tree
    with _apt() as apt:
        if not (tree / "Makefile").exists() or refresh:
            _unpack(apt, series, tree)
    return tree


def _unpack(apt: _Apt, series: str, tree: Path) -> None:
    package = apt.newest(series, [f"linux-source-{series}"], lambda _: True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    unpacking = tree.with_name(f"{tree.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    with apt.downloaded(package) as archive:
        subprocess.run(["dpkg-deb", "-x", archive, unpacking], check=True)
    tarball = next(unpacking.glob(f"usr/src/linux-source-{series}.tar.*"))
    subprocess.run(["tar", "-xf", tarball, "-C", unpacking], check=True)
    shutil.rmtree(tree, ignore_errors=True)
    (unpacking / tree.name).rename(tree)
    shutil.rmtree(unpacking)


@contextmanager
def _apt() -> Iterator[_Apt]:
    """Let one process use apt at a time: a look-up during an update would find no packages."""
    folder = cache_dir() / "apt"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Apt(folder)


class _Apt:
    """apt-get and apt-cache with a separate sources list and state."""

    def __init__(self, folder: Path) -> None:
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise KernelNotFoundError(
                    f"released kernels come from Debian packages, and there is no {program} here"
                )
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._options = [
            f"Dir::Etc::sourcelist={folder}/sources.list",
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            f"Dir::State::lists={folder}/lists",
            f"Dir::Cache={folder}/cache",
            "APT::Architecture=amd64",
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
        ]
        self._update()

    def names(self, pattern: str) -> list[str]:
        """Return the names of the packages that match a regular expression."""
        listing = self._run("apt-cache", "search", "--names-only", pattern)
        return [line.split()[0] for line in listing.splitlines()]

    def newest(self, version: str, names: list[str], wanted: Callable[[Package], bool]) -> Package:
        """Return the newest of these packages whose kernel is of this release or series."""
        if not names:
            raise KernelNotFoundError("the mirror lists no kernel packages")
        listing = self._run("apt-cache", "madison", *names)
        packages = [
            Package(*(field.strip() for field in line.split("|")[:2]))
            for line in listing.splitlines()
        ]
        found = [
            package
            for package in packages
            if f"{package.upstream}.".startswith(f"{version}.") and wanted(package)
        ]
        if not found:
            series = {".".join(package.upstream.split(".")[:2]) for package in packages}
            known = ", ".join(sorted(series, key=lambda name: [int(n) for n in name.split(".")]))
            raise KernelNotFoundError(f"the mirror has no kernel {version}; it has {known}")
        return max(found, key=cmp_to_key(_compare))

    @contextmanager
    def downloaded(self, package: Package) -> Iterator[Path]:
        """Download a package; the context's end deletes it."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            name = f"{package.name}={package.version}"
            self._run("apt-get", "-q", "download", name, cwd=Path(folder))
            yield next(Path(folder).glob("*.deb"))

    def _update(self) -> None:
        sources = "".join(
            f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in _sources()
        )
        (self._folder / "sources.list").write_text(sources)
        # A suite may have moved to an archive site; those that answer are enough.
        self._run("apt-get", "-q", "update", check=False)

    def _run(
        self, program: str, *arguments: str, check: bool = True, cwd: Path | None = None
    ) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        done = subprocess.run(
            [program, *options, *arguments], capture_output=True, text=True, cwd=cwd
        )
        if check and done.returncode:
            raise KernelNotFoundError(f"{program} {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout


def _sources() -> list[tuple[str, str]]:
    """Return (URI, suite) of every suite with kernels, on the mirrors that this machine uses."""
    form = "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mirrors: dict[bool, str] = {}
    for line in listing.splitlines():
        origin, label, uri = line.split("\t")
        if origin == "Debian":
            mirrors.setdefault(label == SECURITY_LABEL, uri)
    if not mirrors:
        raise KernelNotFoundError(
            "this machine's apt sources name no Debian mirror (or `apt-get update` has not run)"
        )
    return [
        (mirrors[security], suite)
        for security, suites in ((False, ARCHIVE_SUITES), (True, SECURITY_SUITES))
        if security in mirrors
        for suite in suites
    ]


def _has_kernel(package: Package) -> bool:
    major, minor = map(int, package.upstream.split(".")[:2])
    return package.name.startswith("linux-binary-") == ((major, minor) >= (6, 19))


def _compare(one: Package, other: Package) -> int:
    def is_(relation: str) -> bool:
        command = ["dpkg", "--compare-versions", one.version, relation, other.version]
        return subprocess.run(command).returncode == 0

    return 1 if is_("gt") else -1 if is_("lt") else 0


def _members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files in a .deb whose names match."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
    ) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as files:
            for member in files:
                file = files.extractfile(member) if member.isfile() else None
                if file is not None and pattern.fullmatch(member.name):
                    yield member.name, file.read()
        # dpkg-deb pads the archive, and dies of SIGPIPE unless the padding is read too.
        assert process.stdout is not None
        process.stdout.read()


def _release(package: Package, path: str) -> str:
    """Name a kernel by its release, and its exact version if that is only an ABI number."""
    name = Path(path).name.partition("-")[2] or Path(path).parent.name
    return name if package.upstream in name else f"{package.upstream}-{name}"


def _replace(folder: Path, path: Path, data: bytes) -> None:
    """Make `path` the only file of a folder, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name}"
    partial.write_bytes(data)
    for old in folder.glob("vmlinuz-*"):
        old.unlink()
    partial.rename(path)


def _checked(version: str) -> str:
    if not _VERSION.fullmatch(version):
        raise KernelNotFoundError(f"{version!r} is no kernel version; 6.12 and 6.12.117 are")
    return version


def main() -> int:
    """Run `get-kernel`."""
    parser = argparse.ArgumentParser(
        prog="get-kernel",
        description="Print the path of a released kernel, fetched from the Debian mirror that "
        "this machine's apt uses. Exit status 1: none is available.",
    )
    parser.add_argument("version", help="a series (6.12: its newest release) or a release")
    parser.add_argument("--refresh", action="store_true", help="look for a newer release")
    parser.add_argument("--source", action="store_true", help="the source tree of a series instead")
    options = parser.parse_args()
    get = source if options.source else kernel
    try:
        print(get(options.version, refresh=options.refresh))
    except KernelNotFoundError as error:
        print(f"get-kernel: {error}", file=sys.stderr)
        return 1
    return 0
