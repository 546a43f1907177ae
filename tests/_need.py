"""What tests need from the kernel, the user and the machine, as pytest marks.

`needs*` return marks, for `@needs(Feature.MOVE)`, `pytestmark` and `pytest.param(...,
marks=...)`; `require` checks one at once, in a fixture, a test body or a child process. A
missing need skips with a reason that says what was found. `PYUFFD_TESTS=require` turns every
skip into a failure, except for the needs named in `PYUFFD_TESTS_MAY_LACK`.

The marks are those of `pyuffd.testing`, whose plugin checks them; the needs themselves, and how
the kernel is asked, are the conformance suite's. `marked(Need(...))` is for others.
"""

from __future__ import annotations

import pytest

from pyuffd.testing import (
    needs,
    needs_hugepages,
    needs_ioctl,
    needs_privilege,
    needs_swap,
    require,
)
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES
from pyuffd.testing._need import CAPABILITIES, Need, kernel_features, range_ioctls
from pyuffd.testing._needs import marked, needs_kernel_faults

__all__ = [
    "CAPABILITIES",
    "HUGE_PAGE",
    "MEMORY_TYPES",
    "Need",
    "free_hugepages",
    "kernel_features",
    "marked",
    "needs",
    "needs_hugepages",
    "needs_ioctl",
    "needs_kernel_faults",
    "needs_privilege",
    "needs_swap",
    "range_ioctls",
    "require",
    "without_userfaultfd",
]

# For tests in the folders of the kernel's tests that open none.
without_userfaultfd = pytest.mark.without_userfaultfd
