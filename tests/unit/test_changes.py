"""Every change fragment has a name that a release understands, and text for users."""

from __future__ import annotations

import re
import tomllib

from tests._child import ROOT

CHANGES = ROOT / "changes"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
KINDS = [kind["directory"] for kind in CONFIG["type"]]
NAME = re.compile(rf"[a-z0-9][a-z0-9-]*\.({'|'.join(KINDS)})\.md")


def test_names_and_texts() -> None:
    fragments = [path for path in CHANGES.iterdir() if path.name not in CONFIG["ignore"]]
    assert [path.name for path in fragments if not NAME.fullmatch(path.name)] == []
    assert [path.name for path in fragments if len(path.read_text().strip()) < 20] == []


def test_the_readme_names_every_kind() -> None:
    text = (CHANGES / "README.md").read_text()
    assert KINDS == ["added", "changed", "fixed", "removed"]
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


def test_the_changelog_has_the_place_for_them() -> None:
    assert CONFIG["start_string"] in (ROOT / CONFIG["filename"]).read_text()
