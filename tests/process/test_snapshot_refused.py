"""`pyuffd snapshot` of a process that may not open a userfaultfd names the way out."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Snapshot, UffdPermissionError
from pyuffd.cli import main
from pyuffd.testing import needs_privilege

pytestmark = needs_privilege("CAP_SYS_PTRACE")


@pytest.mark.parametrize("method", ["auto", "precopy"])
def test_method_that_works(
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_args: Any, **_options: Any) -> None:
        raise UffdPermissionError(errno.EPERM, "userfaultfd in the target, process 1", hint="x")

    monkeypatch.setattr(Snapshot, "take", refused)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            words = ["snapshot", str(child.pid), "-o", str(tmp_path / "s"), "--method", method]
            assert main(words) == 2
        finally:
            child.kill()
    assert ("; x; or --method stopped" in capsys.readouterr().err) == (method == "auto")
