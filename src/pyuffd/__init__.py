"""userfaultfd for Python: page faults handled in user space, by a C engine that needs no Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyuffd._abi import (
    ContinueMode,
    CopyMode,
    EventCode,
    Feature,
    Ioctl,
    MoveMode,
    PageBit,
    PageCategory,
    PagefaultFlag,
    PoisonMode,
    RegisterMode,
    RwprotectMode,
    ScanFlag,
    WriteprotectMode,
    ZeropageMode,
)
from pyuffd._errors import (
    ClosedError,
    CriuError,
    EventsBusyError,
    HandlerError,
    HandoverError,
    HelperLostError,
    LayoutChangedError,
    PageExistsError,
    PagePoisonedError,
    PartialResolveError,
    ProcessGoneError,
    RangeBusyError,
    SnapshotError,
    SnapshotFormatError,
    StopTimeoutError,
    UffdError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._events import Pagefault, Remap, Remove, UnknownEvent, Unmap
from pyuffd._uffd import Event, Fork, Userfaultfd
from pyuffd._uffd_fill import FillResult

if TYPE_CHECKING:
    from pyuffd._lazy import LazyRegion, lazy
    from pyuffd._overlay import OverlaySource
    from pyuffd._probe import KernelSupport, probe
    from pyuffd._residency import PageResidency, Residency, residency
    from pyuffd._working_set import WorkingSet, WorkingSetRun
    from pyuffd.dirty import (
        Blind,
        BlindReason,
        DirtyRound,
        DirtyTracker,
        Grown,
        LayoutChange,
        Mapped,
        Moved,
        Protected,
        Unmapped,
    )
    from pyuffd.handlers import (
        Checkpoint,
        FaultLog,
        Handler,
        HandlerStats,
        Latency,
        LoggedFault,
        PageState,
        RecentFault,
        StateRange,
        StateRanges,
    )
    from pyuffd.handover import (
        Handover,
        HandoverRange,
        UnixListener,
        connect_unix,
        connect_unix_async,
        listen_unix,
        recv_uffd,
        recv_uffd_async,
        send_uffd,
        send_uffd_async,
    )
    from pyuffd.pagemap import PageEntries, Pagemap, PageRange, PageRanges, ScanResult
    from pyuffd.regions import Region, RegionKind
    from pyuffd.remote import (
        Copied,
        Mapping,
        MappingKind,
        Mappings,
        Process,
        RegisterSet,
        Stop,
        Thread,
    )
    from pyuffd.snapshot import (
        CoreFile,
        Restore,
        RestoreStats,
        RunState,
        Snapshot,
        SnapshotGap,
        SnapshotProgress,
        SnapshotRegion,
        SnapshotReport,
        SnapshotRun,
        write_core,
    )
    from pyuffd.sources import (
        PROMISED,
        AsyncSource,
        BufferSource,
        CallableSource,
        FileSource,
        PageSource,
        Promised,
        ZeroSource,
    )
else:
    # Imported when first asked for, so that `import pyuffd` costs what the kernel interface costs.
    _MODULES = {
        "_lazy": "LazyRegion lazy",
        "_overlay": "OverlaySource",
        "_probe": "KernelSupport probe",
        "_residency": "PageResidency Residency residency",
        "_working_set": "WorkingSet WorkingSetRun",
        "dirty": "Blind BlindReason DirtyRound DirtyTracker Grown LayoutChange Mapped Moved"
        " Protected Unmapped",
        "handlers": "Checkpoint FaultLog Handler HandlerStats Latency LoggedFault PageState"
        " RecentFault StateRange StateRanges",
        "handover": "Handover HandoverRange UnixListener connect_unix connect_unix_async"
        " listen_unix recv_uffd recv_uffd_async send_uffd send_uffd_async",
        "pagemap": "PageEntries Pagemap PageRange PageRanges ScanResult",
        "regions": "Region RegionKind",
        "remote": "Copied Mapping MappingKind Mappings Process RegisterSet Stop Thread",
        "snapshot": "CoreFile Restore RestoreStats RunState Snapshot SnapshotGap SnapshotProgress"
        " SnapshotRegion SnapshotReport SnapshotRun write_core",
        "sources": "PROMISED AsyncSource BufferSource CallableSource FileSource PageSource"
        " Promised ZeroSource",
    }
    _LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}

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
    "PROMISED",
    "AsyncSource",
    "Blind",
    "BlindReason",
    "BufferSource",
    "CallableSource",
    "Checkpoint",
    "ClosedError",
    "ContinueMode",
    "Copied",
    "CopyMode",
    "CoreFile",
    "CriuError",
    "DirtyRound",
    "DirtyTracker",
    "Event",
    "EventCode",
    "EventsBusyError",
    "FaultLog",
    "Feature",
    "FileSource",
    "FillResult",
    "Fork",
    "Grown",
    "Handler",
    "HandlerError",
    "HandlerStats",
    "Handover",
    "HandoverError",
    "HandoverRange",
    "HelperLostError",
    "Ioctl",
    "KernelSupport",
    "Latency",
    "LayoutChange",
    "LayoutChangedError",
    "LazyRegion",
    "LoggedFault",
    "Mapped",
    "Mapping",
    "MappingKind",
    "Mappings",
    "MoveMode",
    "Moved",
    "OverlaySource",
    "PageBit",
    "PageCategory",
    "PageEntries",
    "PageExistsError",
    "PagePoisonedError",
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
    "Process",
    "ProcessGoneError",
    "Promised",
    "Protected",
    "RangeBusyError",
    "RecentFault",
    "Region",
    "RegionKind",
    "RegisterMode",
    "RegisterSet",
    "Remap",
    "Remove",
    "Residency",
    "Restore",
    "RestoreStats",
    "RunState",
    "RwprotectMode",
    "ScanFlag",
    "ScanResult",
    "Snapshot",
    "SnapshotError",
    "SnapshotFormatError",
    "SnapshotGap",
    "SnapshotProgress",
    "SnapshotRegion",
    "SnapshotReport",
    "SnapshotRun",
    "StateRange",
    "StateRanges",
    "Stop",
    "StopTimeoutError",
    "Thread",
    "UffdError",
    "UffdOSError",
    "UffdPermissionError",
    "UnixListener",
    "UnknownEvent",
    "Unmap",
    "Unmapped",
    "UnsupportedFeatureError",
    "Userfaultfd",
    "WorkingSet",
    "WorkingSetRun",
    "WriteprotectMode",
    "ZeroSource",
    "ZeropageMode",
    "connect_unix",
    "connect_unix_async",
    "lazy",
    "listen_unix",
    "probe",
    "recv_uffd",
    "recv_uffd_async",
    "residency",
    "send_uffd",
    "send_uffd_async",
    "write_core",
]
