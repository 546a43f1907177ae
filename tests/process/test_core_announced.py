"""The first line of `pyuffd core` where writes cannot be tracked."""

from __future__ import annotations

import argparse
import errno
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from pyuffd import KernelSupport, Process, UffdPermissionError, probe
from pyuffd._probe import OpenSupport
from pyuffd.cli import core
from pyuffd.testing import needs_privilege

REFUSED = OpenSupport(False, errno.EPERM, "a seccomp filter refuses it", "")

pytestmark = needs_privilege("CAP_SYS_PTRACE")


@pytest.mark.parametrize("method", ["auto", "precopy"])
def test_that_it_is_stopped_while_all_is_copied(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe()

    def nothing_opens() -> KernelSupport:
        return replace(found, opens=dict.fromkeys(found.opens, REFUSED))

    def refused(*_args: Any, **_options: Any) -> None:
        raise UffdPermissionError(errno.EPERM, "userfaultfd", hint="it may not")

    monkeypatch.setattr(core, "probe", nothing_opens)
    monkeypatch.setattr(core, "DirtyTracker", refused)
    args = argparse.Namespace(method=method, max_stall=None, full=False)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with Process(child.pid) as target:
                text = core._announcement(args, target)
        finally:
            child.kill()
    if method == "auto":
        assert "it will be stopped while 0 MiB are copied, " in text
        assert (
            "its writes cannot be tracked here ([Errno 1] userfaultfd: Operation not permitted; "
            in text
        )
        assert "with --method precopy there is no core then" in text
        assert "at most" not in text
    else:
        assert "it will be stopped for at most 0.05 s" in text
