"""What tests need from the kernel, the user and the machine, as pytest marks.

`needs*` return marks, for `@needs(Feature.MOVE)`, `pytestmark` and `pytest.param(...,
marks=...)`; `require` checks one at once, in a fixture, a test body or a child process. A
missing need skips with a reason that says what was found. `PYUFFD_TESTS=require` turns every
skip into a failure, except for the needs named in `PYUFFD_TESTS_MAY_LACK`.

The marks are those of `pyuffd.testing`, whose plugin checks them; the needs themselves, and how
the kernel is asked, are the conformance suite's. `pytest.mark.need(Need(...))` is for others.
"""

from __future__ import annotations

from typing import NoReturn

import pytest

from pyuffd.testing import _need, needs, needs_hugepages, needs_ioctl, needs_privilege, needs_swap
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES
from pyuffd.testing._need import (
    CAPABILITIES,
    Lack,
    kernel_features,
    range_ioctls,
)

__all__ = [
    "CAPABILITIES",
    "HUGE_PAGE",
    "MEMORY_TYPES",
    "Need",
    "free_hugepages",
    "kernel_features",
    "needs",
    "needs_hugepages",
    "needs_ioctl",
    "needs_kernel_faults",
    "needs_privilege",
    "needs_swap",
    "range_ioctls",
    "require",
    "skip",
    "strict",
    "without_userfaultfd",
]

# For tests in the folders of the kernel's tests that open none.
without_userfaultfd = pytest.mark.without_userfaultfd


class Need(_need.Need):
    """A condition of a test; `missing` returns the keys that are lacking and what was found."""

    def check(self) -> None:
        """Skip the running test if the need is not met."""
        try:
            super().check()
        except Lack as lack:
            skip(lack)


def needs_kernel_faults() -> pytest.MarkDecorator:
    """Skip where this user may handle the faults of user code only, not those of system calls."""
    return pytest.mark.pyuffd_need(_need.needs_kernel_faults())


def skip(lack: Lack) -> NoReturn:
    """Skip the running test for what is lacking."""
    skipped = pytest.skip.Exception(lack.reason)
    # conftest looks for it in strict mode.
    vars(skipped)["may_lack"] = lack.may_be
    raise skipped


def strict() -> bool:
    """Return whether PYUFFD_TESTS asks that nothing is skipped."""
    try:
        return _need.strict()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def require(mark: pytest.MarkDecorator) -> None:
    """Skip now unless the need that a `needs*` mark carries is met."""
    for need in mark.args:
        try:
            need.check()
        except Lack as lack:
            skip(lack)
