"""`pyuffd restore-bench`."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, RunState, Snapshot, UffdPermissionError
from pyuffd.cli import main
from pyuffd.testing import needs, needs_privilege
from tests import _images

pytestmark = [needs(Feature.MINOR_SHMEM), needs_privilege("CAP_SYS_PTRACE")]
START = 0x7F0000000000
PAGES = 64


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    parent = _images.write(tmp_path / "0", [(START, [_images.data(PAGES)])])
    parts = [_images.data(1, seed=1), _images.zero(1), _images.Part(PAGES - 2, RunState.PARENT)]
    return _images.write(tmp_path / "1", [(START, parts)], parent=parent)


def test_methods(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore-bench", "--json", "--cold", "--rounds", "2", str(chain)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cold"] is True
    names = [row["name"] for row in found["rows"]]
    assert names == ["read", "copy", "minor", "map", "auto"]
    for row in found["rows"]:
        assert "refused" not in row
        assert 0 <= row["ready_s"] <= row["first_s"] <= row["placed_s"] <= row["touched_s"]
        assert row["touched_s"] > 0


def test_one_method_as_a_table(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore-bench", "--mode", "map", str(chain)]) == 0
    head, read, mapped = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "MiB/s"
    assert (read.split()[0], mapped.split()[0]) == ("read", "map")


def test_methods_that_need_privilege_are_left_out(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Snapshot.restore

    def refused(self: Snapshot, *args: Any, **options: Any) -> Any:
        if options["mode"] in ("copy", "minor"):
            raise UffdPermissionError(errno.EPERM, "userfaultfd")
        return restore(self, *args, **options)

    monkeypatch.setattr(Snapshot, "restore", refused)
    assert main(["restore-bench", str(chain)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "needs a userfaultfd" in lines["copy"]
    assert "needs a userfaultfd" in lines["minor"]
    assert "needs a userfaultfd" not in lines["map"]
    assert main(["restore-bench", "--mode", "copy", str(chain)]) == 2
    assert "needs a userfaultfd" in capsys.readouterr().err


def test_what_is_wrong(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = _images.write(tmp_path / "empty", [(START, [_images.zero(1)])])
    for arguments, said in (
        (["--rounds", "0", str(chain)], "is not positive"),
        ([str(empty)], "has no content"),
        ([str(tmp_path / "none")], "No such file"),
    ):
        assert main(["restore-bench", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("verify", ["first", "drain"])
def test_damage_is_no_refusal(verify: str, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(chain.parent / "0" / "pages", "r+b") as pages:
        pages.seek(10 * 4096)
        pages.write(b"damaged")
    arguments = ["restore-bench", "--mode", "copy", "--verify", verify, str(chain)]
    assert main(arguments) == 2
    assert "is not what was written" in capsys.readouterr().err
