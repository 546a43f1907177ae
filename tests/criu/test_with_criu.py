"""Processes that CRIU has dumped are restored with our server of lazy pages."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")

from pyuffd.testing import needs_privilege
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
