"""Processes that CRIU has dumped are restored with our server of lazy pages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")

from pyuffd.testing import needs_privilege
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from tests.criu._namespace import in_namespace, needs_criu

pytestmark = [needs_privilege("CAP_SYS_ADMIN", "CAP_SYS_PTRACE"), needs_criu()]


def test_numbers_after_changes(tmp_path: Path) -> None:
    """Fork, MADV_DONTNEED, munmap and mremap right after the restore; every word is checked."""
    codes, (report,) = in_namespace("numbers", str(tmp_path), 32, True, 1, 2, budget_s=40)
    assert codes == [0]
    assert report["error"] is None
    assert report["content_bytes"] >= 32 << 20
    assert report["faults"] >= 1


@pytest.mark.stress
def test_two_hundred_mebibytes(tmp_path: Path) -> None:
    codes, (report,) = in_namespace("numbers", str(tmp_path), 200, False, 1, 2, budget_s=60)
    assert (codes, report["error"]) == ([0], None)


@pytest.mark.stress
@pytest.mark.parametrize("changes", [False, True])
def test_twenty_restores_from_one_server(tmp_path: Path, changes: bool) -> None:
    codes, reports = in_namespace("numbers", str(tmp_path), 32, changes, 20, 2, budget_s=120)
    assert codes == [0] * 20
    assert [report["error"] for report in reports] == [None] * 20


@pytest.mark.stress
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Again and again, while the process checks its memory."""
    code, (report,) = in_namespace("worker_killed", str(tmp_path), 200, budget_s=60)
    assert (code, report["error"]) == (0, None)
    assert report["helper_restarts"] >= 1


def needs_redis() -> pytest.MarkDecorator:
    def missing() -> tuple[list[str], str]:
        found = shutil.which("redis-server")
        return ([], "") if found else (["redis-server"], "redis-server is not installed")

    return marked(Need("redis-server", missing))


@pytest.mark.stress
@needs_redis()
def test_redis_with_its_threads(tmp_path: Path) -> None:
    before, after, first, threads, (report,) = in_namespace(
        "redis", str(tmp_path), 300_000, budget_s=60
    )
    assert after == before
    assert first.startswith("$")
    assert threads >= 4
    assert report["error"] is None


@pytest.mark.stress
def test_a_tree_of_python_with_a_zombie(tmp_path: Path) -> None:
    code, (report,) = in_namespace("tree", str(tmp_path), budget_s=60)
    assert (code, report["error"]) == (0, None)
    assert (report["processes"], report["zombies"]) == (2, 1)


@pytest.mark.stress
@pytest.mark.parametrize("tls", [False, True])
def test_pages_from_a_page_server(tmp_path: Path, tls: bool) -> None:
    """Two restores over one connection."""
    codes, reports = in_namespace("remote", str(tmp_path), 64, tls, budget_s=60)
    assert codes == [0, 0]
    assert [report["error"] for report in reports] == [None, None]


@pytest.mark.stress
def test_pages_from_a_frozen_source(tmp_path: Path) -> None:
    """The source ends when all has come."""
    code, (report,) = in_namespace("migrate", str(tmp_path), 64, budget_s=60)
    assert (code, report["error"]) == (-9, None)
