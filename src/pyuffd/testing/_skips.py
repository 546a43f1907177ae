"""What is lacking becomes a skip of pytest's: here, and nowhere else.

Whether the skip is a failure instead (PYUFFD_TESTS=require) is for the hook of the plugin,
`_pyuffd_pytestplugin`, to say, which finds the `Lack` in the skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from pyuffd.testing._need import Lack, strict

if TYPE_CHECKING:
    import pytest


def skip(lack: Lack) -> NoReturn:
    """Skip the running test for what is lacking."""
    import pytest

    skipped = pytest.skip.Exception(lack.reason)
    vars(skipped)["lack"] = lack
    raise skipped from None


def lack_of(error: BaseException) -> Lack | None:
    """Return what a skip is for; None for one that no need has made."""
    return vars(error).get("lack")


def may_be_skipped(error: BaseException, *, others: bool) -> bool:
    """Whether a skip may stay one; `others` says that of skips that no need has made."""
    if not strict():
        return True
    lack = lack_of(error)
    return others if lack is None else lack.may_be


def check_mode() -> None:
    """Refuse a value of PYUFFD_TESTS that nobody knows."""
    import pytest

    try:
        strict()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def require(mark: pytest.MarkDecorator | pytest.Mark) -> None:
    """Check a mark of `needs*` now: for fixtures, and for the middle of a test."""
    for need in mark.args:
        try:
            need.check()
        except Lack as lack:
            skip(lack)
