"""Memory to register: `Region` maps memory, or describes an existing mapping (layer L3)."""

from __future__ import annotations

import pyuffd._lost  # noqa: F401 - or `_memory` imports it when a page is lost, perhaps after chroot(2)
from pyuffd.regions._mapping import RegionKind
from pyuffd.regions._region import Region

__all__ = ["Region", "RegionKind"]
