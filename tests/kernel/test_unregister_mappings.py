"""`uffd_unregister_mappings`: what is registered with other userfaultfds stays registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyuffd import Feature, Region, RegisterMode, Userfaultfd, _vmas
from pyuffd._shim import lib
from pyuffd.testing import needs
from tests._memory import PAGE

pytestmark = needs(Feature.PAGEFAULT_FLAG_WP)


def flags(region: Region) -> frozenset[str]:
    """Return the flags of registration of a region's mapping."""
    (vma,) = _vmas.overlapping(region.start, region.start + region.length, details=True)
    return frozenset(vma.flags & {"um", "uw"})


# Before Linux 6.17 the kernel would unregister both.
@pytest.mark.parametrize("mode", [RegisterMode.MISSING, RegisterMode.WP])
def test_others_are_left_alone(mode: RegisterMode) -> None:
    with (
        Region.anonymous(4 * PAGE) as mine,
        Region.anonymous(4 * PAGE) as other,
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as another,
        Path("/proc/self/maps").open("rb") as maps,
    ):
        uffd.register(mine, mode=RegisterMode.WP)
        another.register(other, mode=mode)
        before = flags(other)
        assert before
        for region in mine, other:
            end = region.start + region.length
            assert not lib.uffd_unregister_mappings(uffd.fileno(), maps.fileno(), region.start, end)
        assert flags(mine) == frozenset()
        assert flags(other) == before
