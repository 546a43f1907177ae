"""What `make dist` builds is one commit, even if HEAD moves while it runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from release import build


def git(folder: Path, *words: str, date: int = 1) -> None:
    who = {"NAME": "one", "EMAIL": "one@example.org", "DATE": f"{date} +0000"}
    env = {f"GIT_{role}_{key}": who[key] for role in ("AUTHOR", "COMMITTER") for key in who}
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, env=env)


def test_head_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first", date=1_000_000_000)
    build.commit.cache_clear()
    try:
        first = build.epoch()
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", "second", date=1_000_000_100)
        assert build.epoch() == first == 1_000_000_000
    finally:
        build.commit.cache_clear()
