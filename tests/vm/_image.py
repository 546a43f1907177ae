"""A self-contained initramfs: busybox, this Python, the packages the tests need, the repository.

Everything has the same path as on the host, so the guest needs no configuration. Making it needs no
root, no cpio(1) and no kernel modules.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]

# What the tests import besides the standard library; --with adds to it.
DISTRIBUTIONS = ("pyuffd", "psutil", "pytest", "pytest-xdist")
# What the tests read of the repository.
REPOSITORY = ("pyproject.toml", "README.md", "src", "tests", "csrc", "docs", "examples")
# The parts of the repository that it imports. They are compiled here, once: an emulated CPU takes
# longer for that than for booting.
COMPILED = ("src", "tests/vm")
BYTECODE = ROOT / "build/vm-bytecode"

# If memory is short, the kernel unpacks only a part of an initramfs, silently. So init reports an
# error unless the last entry exists.
LAST = ".complete"

_STDLIB_SKIP = {
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "__phello__", "config"),
}
_SKIP_SUFFIXES = (".a", ".opt-1.pyc", ".opt-2.pyc", ".o")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")

_FOLDERS = ("bin", "dev", "etc", "mnt", "out", "proc", "root", "run", "sys", "tmp", "var/tmp", "vm")
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
_GROUP = b"root:x:0:\nnogroup:x:65534:\n"


class MissingOnHostError(Exception):
    """Something that belongs in the image is not on this machine."""


def build(
    path: Path,
    job: bytes,
    distributions: Iterable[str] = (),
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write an initramfs.

    Args:
        path: the file to write.
        job: what the guest is to do; becomes /vm/job.json.
        distributions: more installed distributions to pack.
        files: more files, by absolute path.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise MissingOnHostError("there is no busybox here (apt-get install busybox-static)")
    tree = _Tree()
    for folder in _FOLDERS:
        tree.folder(f"/{folder}")
    # These first, so that init can report that the rest is missing.
    tree.data("/init", (ROOT / "tests/vm/init").read_bytes(), 0o755)
    tree.data("/bin/busybox", Path(busybox).read_bytes(), 0o755)
    tree.link("/bin/sh", "busybox")
    tree.data("/vm/job.json", job)
    for extra, data in files.items():
        tree.data(extra, data)
    tree.data("/vm/python", sys.executable.encode())
    tree.data("/vm/guest", str(ROOT / "tests/vm/_guest.py").encode())
    tree.data("/etc/passwd", _PASSWD)
    tree.data("/etc/group", _GROUP)
    tree.libraries_of([Path(busybox)])
    for name in _interpreter():
        tree.copy(name)
    for name in _distribution_files([*DISTRIBUTIONS, *distributions]):
        tree.copy(name)
    for folder in COMPILED:
        for source in (ROOT / folder).rglob("*.py"):
            tree.data(importlib.util.cache_from_source(str(source)), _bytecode(source))
    for entry in REPOSITORY:
        for name in _walk(ROOT / entry):
            tree.copy(name)
    tree.libraries_of(path for path in tree.copied if _may_link(path))
    tree.data(f"/{LAST}", b"")
    tree.write(path)


class _Tree:
    """Entries of the archive by absolute path; parents and symbolic links are added too."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes | Path, int]] = {}
        self.copied: list[Path] = []

    def folder(self, name: str) -> None:
        parent = os.path.dirname(name)
        if parent != "/":
            self.folder(parent)
        self._entries.setdefault(name, (stat.S_IFDIR | 0o755, b"", 0))

    def data(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def copy(self, path: Path) -> None:
        """Add a file of the host, with every symbolic link in its path."""
        done = Path("/")
        rest = list(path.parts[1:])
        while rest:
            done /= rest.pop(0)
            if done.is_symlink():
                target = os.readlink(done)
                self.link(str(done), target)
                rest = [*Path(os.path.normpath(done.parent / target)).parts[1:], *rest]
                done = Path("/")
        if str(done) not in self._entries and done.is_file():
            status = done.stat()
            # Python checks a .pyc against the time of its source.
            mode = stat.S_IFREG | (status.st_mode & 0o755)
            self._add(str(done), mode, done, int(status.st_mtime))
            self.copied.append(done)

    def libraries_of(self, programs: Iterable[Path]) -> None:
        """Add the libraries that the dynamic loader will look for."""
        found: set[str] = set()
        for program in programs:
            done = subprocess.run(["ldd", program], capture_output=True, text=True)
            found.update(_LIBRARY.findall(done.stdout))
        # The C library loads this one when a thread ends.
        cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
        found.update(re.findall(r"libgcc_s\.so\.1 .*x86-64.* => (\S+)", cache))
        for library in sorted(found):
            self.copy(Path(library))

    def write(self, path: Path) -> None:
        """Write everything as a newc archive, in the order in which it was added."""
        with path.open("wb") as out:
            for number, (name, (mode, source, mtime)) in enumerate(self._entries.items(), 1):
                try:
                    data = source.read_bytes() if isinstance(source, Path) else source
                except FileNotFoundError:  # a test run in parallel removes its files
                    continue
                _write_entry(out, number, name.lstrip("/"), mode, data, mtime)
            _write_entry(out, 0, "TRAILER!!!", 0, b"", 0)

    def _add(self, name: str, mode: int, source: bytes | Path, mtime: int = 0) -> None:
        if name not in self._entries:
            parent = os.path.dirname(name)
            if parent not in ("/", "") and parent not in self._entries:
                self.folder(parent)
            self._entries[name] = (mode, source, mtime)


def _bytecode(source: Path) -> bytes:
    """Return the compiled file, which Python uses without checking the time of its source."""
    compiled = BYTECODE / f"{source.relative_to(ROOT)}.{sys.implementation.cache_tag}.pyc"
    if not compiled.exists() or compiled.stat().st_mtime_ns < source.stat().st_mtime_ns:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(compiled), doraise=True, invalidation_mode=mode)
    return compiled.read_bytes()


def _write_entry(out: BinaryIO, number: int, name: str, mode: int, data: bytes, mtime: int) -> None:
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(encoded), 0)
    out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
    out.write(b"\0" * (-(110 + len(encoded)) % 4) + data + b"\0" * (-len(data) % 4))


def _interpreter() -> Iterator[Path]:
    """Yield the files of the running Python and of its virtual environment."""
    yield Path(sys.executable)
    if sys.prefix != sys.base_prefix:
        yield Path(sys.prefix) / "pyvenv.cfg"
    yield from _walk(Path(sysconfig.get_path("stdlib")), _STDLIB_SKIP)


def _distribution_files(names: Iterable[str]) -> Iterator[Path]:
    """Yield the files of these distributions and of those that they require."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in DISTRIBUTIONS:
                raise MissingOnHostError(
                    f"{sys.executable} has no {name} to take along (make test installs it)"
                ) from None
            continue
        for file in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(file))))
            if not path.name.endswith(_SKIP_SUFFIXES) and path.is_file():
                yield path
        for requirement in distribution.requires or ():
            match = _REQUIREMENT.match(requirement)
            if match and "extra ==" not in requirement:
                waiting.append(match[0])


def _walk(start: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    if start.is_file():
        yield start
    for folder, folders, files in os.walk(start):
        folders[:] = sorted(name for name in folders if not name.startswith(tuple(skip) or "\0"))
        for name in sorted(files):
            if not name.endswith(_SKIP_SUFFIXES):
                yield Path(folder, name)


def _may_link(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
