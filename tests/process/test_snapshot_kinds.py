"""Snapshots of all kinds of memory: every method says the same of every page."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import DirtyTracker, Feature, PageRanges, Process, RunState, Snapshot
from pyuffd._owned import Descriptor
from pyuffd.snapshot import _memory_files
from pyuffd.snapshot._capture import Used
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._need import needs_hugepages, needs_swap
from pyuffd.testing._run import SCALE
from tests._child import ROOT, run_child
from tests._memory import PAGE
from tests.process import _memory_kinds as kinds
from tests.process._tracking import METHODS

pytestmark = [
    needs(
        Feature.WP_ASYNC
        | Feature.WP_UNPOPULATED
        | Feature.WP_HUGETLBFS_SHMEM
        | Feature.POISON
        | Feature.MINOR_SHMEM
    ),
    needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN"),
]
Target = tuple[Process, list[kinds.Kind]]
LIMIT_S = 30.0 * SCALE


def there_is(need: object) -> bool:
    return not need.missing()[0]  # type: ignore[attr-defined]


def conditions() -> tuple[bool, bool]:
    """Whether there are huge pages and swap; the rest of the table does not need them."""
    return there_is(needs_hugepages(10)), there_is(needs_swap())


@contextmanager
def program(folder: Path) -> Iterator[tuple[Process, list[kinds.Kind]]]:
    words = [str(folder), *(str(int(one)) for one in conditions())]
    pipe = subprocess.PIPE
    popen = subprocess.Popen(
        [sys.executable, "-m", "tests.process._memory_kinds", *words],
        stdin=pipe,
        stdout=pipe,
        cwd=ROOT,
    )
    try:
        assert popen.stdout is not None
        made = [kinds.Kind(**one) for one in json.loads(popen.stdout.readline())]
        with Process(popen.pid) as process:
            yield process, made
    finally:
        popen.kill()
        popen.communicate()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with program(tmp_path_factory.mktemp("kinds")) as found:
        yield found


def take(process: Process, path: Path, method: Used, **more: object) -> None:
    Snapshot.take(
        process,
        path,
        method=method,
        shared="pause",
        durable=False,
        max_stall_s=LIMIT_S,
        **more,  # type: ignore[arg-type]
    )


def test_every_method_says_the_same(target: Target, tmp_path: Path) -> None:
    """So do incremental snapshots, and the flat copy of a chain."""
    wrong: dict[str, list[str]] = {}

    def check(name: str) -> None:
        with Snapshot.open(tmp_path / name) as snapshot:
            snapshot.verify()
            wrong[name] = kinds.check(snapshot, made)
            special = [gap.detail for gap in snapshot.gaps if gap.reason == "special"]
            assert {"[vdso]", "[vvar]"} <= set(special)

    process, made = target
    assert len(made) >= 14
    for method in METHODS:
        take(process, tmp_path / method, method)
        check(method)
    take(process, tmp_path / "compared", "cow", parent=tmp_path / "stopped")
    check("compared")
    with DirtyTracker(process) as tracker:
        take(process, tmp_path / "first", "precopy", tracker=tracker)
        take(process, tmp_path / "next", "precopy", tracker=tracker, parent=tmp_path / "first")
    check("next")
    with Snapshot.open(tmp_path / "next") as snapshot:
        assert snapshot.depth == 1
        snapshot.flatten(tmp_path / "flat", durable=False)
    check("flat")
    assert wrong == {name: [] for name in wrong}


def test_a_part_of_shared_memory(target: Target, tmp_path: Path) -> None:
    """Also of what only another process has touched."""
    process, made = target
    shared = next(kind for kind in made if kind.name == "shared, anonymous")
    (part,) = PageRanges.of([(shared.start + PAGE, shared.start + 3 * PAGE)])
    for method in METHODS:
        take(process, tmp_path / method, method, ranges=[part])
        with Snapshot.open(tmp_path / method) as snapshot:
            assert [(r.start, r.length) for r in snapshot.regions] == [(part.start, part.length)]
            assert snapshot.read(part.start, PAGE) == bytes([shared.content[1]]) * PAGE
            assert snapshot.state(part.start + PAGE) is RunState.ZERO


def test_without_the_privilege_to_open_files(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process has not touched of shared memory is LOST, and a gap says why."""

    def refused(*_: object) -> Descriptor:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_memory_files, "_opened", refused)
    process, made = target
    kinds_of = {kind.name: kind for kind in made}
    for method in METHODS:
        take(process, tmp_path / method, method)
        with Snapshot.open(tmp_path / method) as snapshot:
            unseen = PageRanges.of(
                (gap.start, gap.start + gap.length)
                for gap in snapshot.gaps
                if gap.reason == "unseen"
            )
            for name, page in (("memfd", 2), ("shared, anonymous", 1)):
                kind = kinds_of[name]
                assert snapshot.read(kind.start, PAGE) == bytes([kind.content[0]]) * PAGE
                at = kind.start + page * PAGE
                assert snapshot.state(at) is RunState.LOST
                assert (unseen & PageRanges.of([(at, at + PAGE)])).bytes == PAGE


def of_this_process(folder: str, with_huge: bool, with_swap: bool) -> None:
    made = kinds.made(folder, with_huge=with_huge, with_swap=with_swap)
    wrong = {}
    with Process(os.getpid()) as me:
        for method in METHODS:
            take(me, Path(folder, method), method)
            with Snapshot.open(f"{folder}/{method}") as snapshot:
                wrong[method] = kinds.check(snapshot, made)
    assert wrong == {method: [] for method in METHODS}, wrong


def test_of_ones_own_process(tmp_path: Path) -> None:
    run_child(of_this_process, str(tmp_path), *conditions(), budget_s=60)
