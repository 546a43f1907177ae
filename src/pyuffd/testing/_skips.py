"""The only place that turns a `Lack` into a skip of pytest.

The plugin's hook, `_pyuffd_pytestplugin`, finds the `Lack` in the skip and decides whether the skip
becomes a failure (PYUFFD_TESTS=require).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from pyuffd.testing._need import Lack, strict

if TYPE_CHECKING:
    import pytest


def skip(lack: Lack) -> NoReturn:
    """Skip the running test because of what is lacking."""
    import pytest

    skipped = pytest.skip.Exception(lack.reason)
    vars(skipped)["lack"] = lack
    raise skipped from None


def lack_of(error: BaseException) -> Lack | None:
    """Return the `Lack` behind a skip; None if no need caused it."""
    return vars(error).get("lack")


def may_be_skipped(error: BaseException, *, others: bool) -> bool:
    """Whether a skip may stay a skip; `others` decides for skips that no need caused."""
    if not strict():
        return True
    lack = lack_of(error)
    return others if lack is None else lack.may_be


def check_mode() -> None:
    """Refuse an unknown value of PYUFFD_TESTS."""
    import pytest

    try:
        strict()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def require(mark: pytest.MarkDecorator | pytest.Mark) -> None:
    """Check a mark from `needs*` now, in a fixture or in the middle of a test."""
    for need in mark.args:
        try:
            need.check()
        except Lack as lack:
            skip(lack)
