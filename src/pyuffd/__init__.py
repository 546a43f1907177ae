"""userfaultfd for Python: page faults handled in user space, by a C engine that needs no Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyuffd._abi import (
    ContinueMode,
    CopyMode,
    Event,
    EventCode,
    Feature,
    Fork,
    Ioctl,
    MoveMode,
    PageBit,
    PageCategory,
    Pagefault,
    PagefaultFlag,
    PoisonMode,
    RegisterMode,
    Remap,
    Remove,
    RwprotectMode,
    ScanFlag,
    UnknownEvent,
    Unmap,
    WriteprotectMode,
    ZeropageMode,
)
from pyuffd._errors import (
    ClosedError,
    HandlerError,
    LayoutChangedError,
    PageExistsError,
    PartialResolveError,
    ProcessGoneError,
    RangeBusyError,
    UffdError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._residency import PageResidency, Residency, residency
from pyuffd._uffd import FillResult, Userfaultfd
from pyuffd.pagemap import PageEntries, Pagemap, PageRange, PageRanges, ScanResult
from pyuffd.regions import Region, RegionKind

if TYPE_CHECKING:
    from pyuffd._probe import KernelSupport, probe
    from pyuffd.handlers import Handler, HandlerStats, Latency, PageState, RecentFault
    from pyuffd.sources import BufferSource, FileSource, PageSource, ZeroSource
else:
    _LAZY = {
        **dict.fromkeys(["KernelSupport", "probe"], "_probe"),
        **dict.fromkeys(
            ["Handler", "HandlerStats", "Latency", "PageState", "RecentFault"], "handlers"
        ),
        **dict.fromkeys(["BufferSource", "FileSource", "PageSource", "ZeroSource"], "sources"),
    }

    def __getattr__(name):
        """Import what few programs use when it is first asked for."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_LAZY})


__version__ = "0.1.0"

__all__ = [
    "BufferSource",
    "ClosedError",
    "ContinueMode",
    "CopyMode",
    "Event",
    "EventCode",
    "Feature",
    "FileSource",
    "FillResult",
    "Fork",
    "Handler",
    "HandlerError",
    "HandlerStats",
    "Ioctl",
    "KernelSupport",
    "Latency",
    "LayoutChangedError",
    "MoveMode",
    "PageBit",
    "PageCategory",
    "PageEntries",
    "PageExistsError",
    "PageRange",
    "PageRanges",
    "PageResidency",
    "PageSource",
    "PageState",
    "Pagefault",
    "PagefaultFlag",
    "Pagemap",
    "PartialResolveError",
    "PoisonMode",
    "ProcessGoneError",
    "RangeBusyError",
    "RecentFault",
    "Region",
    "RegionKind",
    "RegisterMode",
    "Remap",
    "Remove",
    "Residency",
    "RwprotectMode",
    "ScanFlag",
    "ScanResult",
    "UffdError",
    "UffdOSError",
    "UffdPermissionError",
    "UnknownEvent",
    "Unmap",
    "UnsupportedFeatureError",
    "Userfaultfd",
    "WriteprotectMode",
    "ZeroSource",
    "ZeropageMode",
    "probe",
    "residency",
]
