"""What a test needs of the kernel, the user and the machine, as pytest marks.

pytest is imported when a mark is made, not before: the other parts of the kit work without it.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from pyuffd.testing import _need
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._need import Need

if TYPE_CHECKING:
    import pytest


def needs(feature: IntFlag) -> pytest.MarkDecorator:
    """Skip the test unless the kernel offers these userfaultfd features to this user.

    Args:
        feature: `Feature` bits; `Feature(0)` asks only for a userfaultfd.

    Returns:
        A mark: a decorator, an item of `pytestmark`, or the `marks` of `pytest.param`. The
        skip's reason says what was found. With `PYUFFD_TESTS=require` in the environment
        the test fails instead, unless `PYUFFD_TESTS_MAY_LACK` names what is lacking.
    """
    return marked(_need.needs(feature))


def needs_ioctl(
    ioctl: IntFlag, memory: str = "anon", mode: int = 1, features: int = 0
) -> pytest.MarkDecorator:
    """Skip unless registering this memory type in this mode gives these ioctls.

    Args:
        ioctl: `Ioctl` bits of the mask that UFFDIO_REGISTER returns.
        memory: anon, shmem, shmem-private, hugetlb or hugetlb-private.
        mode: `RegisterMode` bits; 1 is MISSING.
        features: `Feature` bits to enable before registering.

    Returns:
        A mark, as from `needs`.
    """
    return marked(_need.needs_ioctl(ioctl, memory, mode, features))


def needs_privilege(*capabilities: str) -> pytest.MarkDecorator:
    """Skip unless this process has these capabilities; CAP_SYS_ADMIN if none is named."""
    if unknown := set(capabilities) - set(_need.CAPABILITIES):
        raise ValueError(f"{sorted(unknown)}: known are {sorted(_need.CAPABILITIES)}")
    return marked(_need.needs_privilege(*capabilities))


def needs_hugepages(count: int, size: int = HUGE_PAGE) -> pytest.MarkDecorator:
    """Skip unless `count` huge pages of `size` bytes are free when the test begins."""
    return marked(_need.needs_hugepages(count, size))


def needs_swap() -> pytest.MarkDecorator:
    """Skip unless some swap is on."""
    return marked(_need.needs_swap())


def needs_kernel_faults() -> pytest.MarkDecorator:
    """Skip if this user may handle only faults of user code, not those of system calls."""
    return marked(_need.needs_kernel_faults())


def needs_syscall() -> pytest.MarkDecorator:
    """Skip unless userfaultfd(2), without the device, may handle faults of system calls."""
    return marked(_need.needs_syscall())


def marked(need: Need) -> pytest.MarkDecorator:
    """Return the mark that skips a test unless a need is met."""
    import pytest

    return pytest.mark.pyuffd_need(need)
