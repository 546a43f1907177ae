"""The console sessions of README.md and docs/ do what the pages show."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pyuffd import Feature
from pyuffd.testing import needs, needs_privilege
from tests import _readme, _sessions
from tests._child import limit_s
from tests._gil import needs_gil
from tests.kernel.test_readme import is_line
from tests.process._tracking import OF_OTHERS
from tests.process.test_track_process import needs_program

# What differs from run to run: numbers, and the folders that files are in. Columns move with them.
VARIES = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{32}\b|\b\d+(?:\.\d+)?\b|(?:/[\w.-]+)+(?=/)")
SPACES = re.compile(r" {2,}")
LIMIT_S = 60.0
BIN = Path(sys.executable).parent


def need_by_name(name: str) -> pytest.MarkDecorator | list[pytest.MarkDecorator]:
    """Return the mark for a name in the comment before a block."""
    if name == "other-processes":
        return OF_OTHERS
    if name == "gil":
        return needs_gil(there=True)
    if name.startswith("CAP_"):
        return needs_privilege(name)
    if name in Feature.__members__:
        return needs(Feature[name])
    beside = BIN / name
    return needs_program(str(beside) if beside.exists() else name)


def marks(session: _sessions.Session) -> list[pytest.MarkDecorator]:
    found: list[pytest.MarkDecorator] = []
    for name in dict.fromkeys(session.needs):
        mark = need_by_name(name)
        found += mark if isinstance(mark, list) else [mark]
    return found


SESSIONS = [
    pytest.param(session, id=str(page.relative_to(_readme.ROOT)), marks=marks(session))
    for page in _readme.PAGES
    if (session := _sessions.session(page)).steps
]


def test_there_are_sessions() -> None:
    assert len(SESSIONS) >= 4


@pytest.mark.parametrize("session", SESSIONS)
def test_session(session: _sessions.Session, tmp_path: Path) -> None:
    done = _sessions.run(session.steps, tmp_path / "here", limit_s(LIMIT_S))
    assert len(done) == len(session.steps), "the shell ended early"
    for step, result in zip(session.steps, done, strict=True):
        assert result.status == 0, f"$ {step.command}\n{result.text}"
        found = [plain(line) for line in result.text.splitlines()]
        for line in step.output:
            start, more, _ = plain(line).partition(" ...")
            at = next(
                (at for at, text in enumerate(found) if is_line(text, start, bool(more))), None
            )
            assert at is not None, f"not printed: {line}\n$ {step.command}\n{result.text}"
            del found[: at + 1]


def plain(line: str) -> str:
    """Return a line without what differs from run to run."""
    return SPACES.sub(" ", VARIES.sub("N", line)).strip()
