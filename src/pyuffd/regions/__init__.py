"""Memory to register: `Region` maps memory, or describes an existing mapping (layer L3)."""

from __future__ import annotations

from pyuffd.regions._mapping import RegionKind
from pyuffd.regions._region import Region

__all__ = ["Region", "RegionKind"]
