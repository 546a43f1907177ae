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

from pyuffd.conformance import _need
from pyuffd.conformance._need import (
    CAPABILITIES,
    HUGE_PAGE,
    MEMORY_TYPES,
    Lack,
    free_hugepages,
    kernel_features,
    range_ioctls,
)
from pyuffd.testing import needs, needs_hugepages, needs_ioctl, needs_privilege, needs_swap

__all__ = [
    "CAPABILITIES",
    "HUGE_PAGE",
    "MEMORY_TYPES",
    "USER_MODE_SUFFICES",
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

# Of those folders, the modules whose tests make do with UFFD_USER_MODE_ONLY, but for those that
# say needs_kernel_faults(). All others need the faults of system calls too.
USER_MODE_SUFFICES = frozenset(
    f"{name}.py"
    for name in [
        "kernel/conformance/test_conformance",
        "kernel/conformance/test_context",
        "kernel/test_async_events",
        "kernel/test_docstrings",
        "kernel/test_examples",
        "kernel/test_handler_faults",
        "kernel/test_handler_lifetime",
        "kernel/test_handler_native",
        "kernel/test_handler_prefetch",
        "kernel/test_handler_preserve",
        "kernel/test_handler_serve",
        "kernel/test_handler_stats",
        "kernel/test_handler_threads",
        "kernel/test_inline_signals",
        "kernel/test_layout_events",
        "kernel/test_layout_races",
        "kernel/test_memory",
        "kernel/test_memory_types",
        "kernel/test_pagemap",
        "kernel/test_pagemap_scan",
        "kernel/test_probe",
        "kernel/test_readme",
        "kernel/test_regions",
        "kernel/test_regions_arrays",
        "kernel/test_regions_create",
        "kernel/test_regions_pages",
        "kernel/test_residency",
        "kernel/test_sole_owners",
        "kernel/test_testing_kit",
        "kernel/test_userfaultfd_continue",
        "kernel/test_userfaultfd_copy",
        "kernel/test_userfaultfd_events",
        "kernel/test_userfaultfd_fill",
        "kernel/test_userfaultfd_move",
        "kernel/test_userfaultfd_open",
        "kernel/test_userfaultfd_poison",
        "kernel/test_userfaultfd_register",
        "kernel/test_userfaultfd_writeprotect",
        "process/test_demo",
        "process/test_doctor",
        "process/test_fork_use",
        "process/test_machine",
        "process/test_process_driver_wire",
    ]
)


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
