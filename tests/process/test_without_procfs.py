"""A process that sees no procfs, after chroot(2): what needs it says so, and the rest works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    BufferSource,
    DirtyTracker,
    Feature,
    FileSource,
    Handler,
    Pagemap,
    Process,
    Region,
    Snapshot,
    Userfaultfd,
    write_core,
)
from pyuffd.testing import needs, needs_privilege
from tests._child import run_child

PAGE = 4096

pytestmark = [needs_privilege("CAP_SYS_ADMIN"), needs(Feature.POISON)]


class World:
    """What was made before chroot(2)."""

    def __init__(self) -> None:
        self.region = Region.anonymous(2 * PAGE)
        self.file = open(os.memfd_create("file"), "w+b")  # noqa: SIM115
        self.file.write(bytes(PAGE))
        self.file.flush()
        self.process = Process(os.getppid())
        self.served = Region.anonymous(PAGE)
        self.uffd = Userfaultfd()
        self.handler = Handler(self.uffd)
        self.handler.serve(self.served, BufferSource(b"x" * PAGE))
        self.handler.start()


Call = Callable[[World], Any]

SAYS: dict[str, Call] = {
    "Region.shm": lambda w: Region.shm("pyuffd-without-procfs", PAGE),
    "Region.file": lambda w: Region.file(w.file),
    "Region.at": lambda w: Region.at(w.region.start, PAGE),
    "Region.residency": lambda w: w.region.residency(),
    "Pagemap": lambda w: Pagemap(),
    "Pagemap of another": lambda w: Pagemap(os.getppid()),
    "Process": lambda w: Process(os.getppid()),
    "DirtyTracker": lambda w: DirtyTracker(w.region),
    "FileSource": lambda w: FileSource(w.file.fileno()),
    "from_fd": lambda w: Userfaultfd.from_fd(Userfaultfd().detach()),
    "mappings": lambda w: Process(os.getpid()).mappings(),
    "core": lambda w: write_core(w.process, "core"),
    "snapshot": lambda w: Snapshot.take(w.process, "snapshot"),
    "snapshot of oneself": lambda w: Snapshot.take(w.region, "snapshot"),
    "serve": lambda w: w.handler.serve(w.region, BufferSource(bytes(2 * PAGE))),
}


WORKS: dict[str, Call] = {
    "read what is served": lambda w: w.served.read(0, 1).decode(),
    "Region.anonymous": lambda w: Region.anonymous(1 << 21).close(),
    "Region.memfd": lambda w: Region.memfd(PAGE).close(),
    "probe": lambda w: pyuffd.probe(),
}


def in_a_chroot(call: Call) -> str:
    """Call something where there are no files; return what it says."""
    pyuffd.probe()  # loaded here
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        with open(write_fd, "w") as pipe:
            pipe.write(said_in_a_chroot(call))
        os._exit(0)
    os.close(write_fd)
    with open(read_fd) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


def said_in_a_chroot(call: Call) -> str:
    world = World()
    os.makedirs("dev/shm")
    os.chroot(".")
    try:
        call(world)
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'errno', None)}: {error}"
    return ""


def says(name: str, folder: str) -> None:
    os.chdir(folder)
    said = in_a_chroot(SAYS[name])
    assert said.startswith(f"UffdOSError {errno.ENOENT}: "), said
    assert "procfs is not mounted" in said, said


def works(name: str, folder: str) -> None:
    os.chdir(folder)
    assert in_a_chroot(WORKS[name]) == ""


@pytest.mark.parametrize("name", SAYS)
def test_says_that_it_needs_procfs(name: str, tmp_path: Path) -> None:
    run_child(says, name, str(tmp_path))


@pytest.mark.parametrize("name", WORKS)
def test_works_without_it(name: str, tmp_path: Path) -> None:
    run_child(works, name, str(tmp_path))
