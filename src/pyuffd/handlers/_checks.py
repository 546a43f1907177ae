"""Checks of the arguments of a `Handler`, and the error that stop() raises (layer L4)."""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections.abc import Iterable
from typing import Literal

from pyuffd._abi import Feature, RegisterMode
from pyuffd._arguments import (
    LONGEST_S,
    check_choice,
    check_flags,
    check_int,
    check_number,
    check_seconds,
    shown,
)
from pyuffd._describe import counted, text_of
from pyuffd._diagnose import why_unresolved
from pyuffd._errors import HandlerError
from pyuffd._pages import (
    RangeLike,
    check_page_size,
    check_range,
    check_region,
    page_size_of,
)
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._types import Failure, FailureStage, SourceFailure
from pyuffd.sources import PageSource

Driver = Literal["auto", "native", "inline", "process", "thread"]
Policy = Literal["poison", "stall", "kill"]

DRIVERS = ("auto", "native", "inline", "process", "thread")
POLICIES = ("poison", "stall", "kill")
_MISSING, _WP = int(RegisterMode.MISSING), int(RegisterMode.WP)
_SERVED_MODES = _MISSING | _WP | int(RegisterMode.MINOR)
LAYOUT_EVENTS = (
    Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
)
STOP_LIMIT_S = 10.0
# A page source that needs longer than this, with the GIL free, is too slow for faults.
STALL_TIMEOUT_S = 2.0
MAX_WORKERS = 1024  # threads of one process; more would only compete for the GIL


def choose_driver(driver: Driver, uffd: Userfaultfd) -> Driver:
    """Return the driver, chosen for "auto"; raise ValueError if it cannot work."""
    check_is_uffd(uffd)
    has_sigbus = bool(uffd.features & Feature.SIGBUS)
    check_choice("driver", driver, DRIVERS)
    if driver == "auto":
        return "inline" if has_sigbus else "native"
    if driver == "inline" and not has_sigbus:
        raise ValueError("driver='inline' needs Userfaultfd(features=Feature.SIGBUS)")
    if driver != "inline" and has_sigbus:
        raise ValueError(
            "a userfaultfd with Feature.SIGBUS sends no messages: use driver='inline' with it"
        )
    return driver


def check_is_uffd(uffd: object) -> None:
    """Raise TypeError for what cannot be a userfaultfd."""
    if isinstance(uffd, type) or not hasattr(uffd, "features"):
        raise TypeError(
            f"uffd: {shown(uffd)} is not a Userfaultfd; Userfaultfd.from_fd() adopts a descriptor"
        )


def check_uffd(driver: str, uffd: Userfaultfd) -> None:
    """Raise ValueError unless the driver supports this userfaultfd."""
    events = uffd.features & LAYOUT_EVENTS
    if driver == "inline":
        if events:
            raise ValueError(
                f"the inline driver reads no messages, so it does not support {events!r}"
            )
    elif not fcntl.fcntl(uffd.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK:
        raise ValueError(f"driver={driver!r} needs a userfaultfd opened with nonblocking=True")


def check_options(
    driver: str,
    on_error: str,
    prefetch: int,
    spin_us: float | None,
    cpus: list[int],
    workers: int,
    stall_timeout_s: float | None,
) -> None:
    """Raise ValueError for bad options, and for options that cannot be combined."""
    check_choice("on_error", on_error, POLICIES)
    check_int("prefetch", prefetch, 0)
    if spin_us is not None:
        check_number("spin_us", spin_us, LONGEST_S * 1e6)
    if not 1 <= check_int("workers", workers) <= MAX_WORKERS:
        raise ValueError(f"workers {workers} is not between 1 and {MAX_WORKERS}")
    if stall_timeout_s is not None and not check_seconds("stall_timeout_s", stall_timeout_s):
        raise ValueError(f"stall_timeout_s {stall_timeout_s} must be above zero")
    if driver != "inline":
        return
    if on_error == "stall":
        raise ValueError(
            "on_error='stall' does not work with driver='inline': it has no other thread that"
            " could resolve the fault later"
        )
    if cpus or spin_us is not None:
        raise ValueError("driver='inline' has no thread: cpus and spin_us have no effect with it")


def stall_limit_ns(stall_timeout_s: float | None) -> int:
    """Return the limit for the engine; 0 if there is none."""
    limit_s = STALL_TIMEOUT_S if stall_timeout_s is None else stall_timeout_s
    return 0 if limit_s == math.inf else max(1, int(min(limit_s, LONGEST_S) * 1e9))


def check_timeout(timeout_s: float | None) -> float:
    """Return the limit of stop() in seconds."""
    if timeout_s is None:
        return STOP_LIMIT_S
    return check_seconds("timeout_s", timeout_s)


def check_cpus(cpus: Iterable[int] | None) -> list[int]:
    """Return the CPUs in ascending order; [] for any CPU."""
    if cpus is None:
        return []
    if isinstance(cpus, (str, bytes, type)) or not isinstance(cpus, Iterable):
        raise TypeError(f"cpus must be numbers of CPUs, not {shown(cpus)}")
    wanted = sorted({check_int("cpus", cpu) for cpu in cpus})
    allowed = os.sched_getaffinity(0)
    bad = [cpu for cpu in wanted if cpu not in allowed]
    if bad or not wanted:
        raise ValueError(f"cpus {bad or wanted} are not among the CPUs {sorted(allowed)}")
    return wanted


def region_numbers(region: RangeLike) -> tuple[int, int, int]:
    """Return start, length and page size of a range that can be served."""
    check_region(region)
    page_size = check_page_size(page_size_of(region))
    start, length = region.start, region.length
    check_range(start, length, page_size)
    return start, length, page_size


def check_mode(
    mode: RegisterMode, source: PageSource | None, preserve: object, features: Feature
) -> None:
    """Raise ValueError unless mode, source, preserve and the features can be combined."""
    check_flags("mode", mode, RegisterMode)
    # Plain numbers: arithmetic with flags is slow, and a restore serves thousands of ranges.
    modes = int(mode)
    if not modes or modes & ~_SERVED_MODES:
        raise ValueError(f"a Handler serves MISSING, WP and MINOR, not {mode!r}")
    if modes & _MISSING and source is None:
        raise ValueError("missing faults need a source; use ZeroSource() for zeros")
    if mode == RegisterMode.WP and source is not None:
        raise ValueError("RegisterMode.WP alone fills no pages: pass None as the source")
    if modes & _WP and features & Feature.WP_ASYNC:
        raise ValueError(
            "with Feature.WP_ASYNC the kernel lifts the protection without sending a fault, so a"
            " Handler would see no write: register the range and use Pagemap.scan(), or open the"
            " Userfaultfd without WP_ASYNC"
        )
    if preserve is not None and mode != RegisterMode.WP:
        raise ValueError(f"preserve needs mode=RegisterMode.WP, not {mode!r}")


_NOT_ANSWERED = {
    errno.EDEADLK: "a page source waits for memory of its own handler, which it would have to read",
    errno.EBUSY: "no worker was free, since they wait for memory for other pages,",
}


def handler_error(
    failure: Failure, source: SourceFailure | None, owner_pid: int = 0
) -> HandlerError:
    """Return what stop() raises: the first failure, with the source's exception as its cause.

    `owner_pid` is the process whose memory it is; 0 if there are several, or it is unknown.
    """
    what = {
        FailureStage.SOURCE: "the content of a page could not be read",
        FailureStage.RESOLVE: "a fault could not be resolved",
        FailureStage.UNSERVED: "a fault occurred in a registered range that is not served",
        FailureStage.READ: "the userfaultfd could not be read",
        FailureStage.FORK: "a fork could not be followed",
        FailureStage.STALLED: "a page source did not answer in time",
        FailureStage.SAVE: "the old content of a page could not be saved",
    }.get(failure.stage, "the engine failed")
    if failure.stage is FailureStage.STALLED:
        what = _NOT_ANSWERED.get(failure.error, what)
    elif failure.stage is FailureStage.SAVE and failure.error == errno.ENODATA:
        what = (
            "a page was no longer protected when it was saved (KSM had merged it, or other code"
            " lifted the protection), so the saved content may be newer than the protection,"
        )
    address, length = failure.address, failure.length
    if not address and source is not None:
        address, length = source.start, source.length
    place = f" at {address:#x}" if address else ""
    hint = why_unresolved(failure.error, address, owner_pid) if owner_pid else ""
    why = failure.text
    if failure.error == errno.EOWNERDEAD and source is not None:  # which, and what ended it
        why = text_of(source.error)
    pages = counted(failure.count, "page")
    # What the kernel says of a lack of huge pages, "Resource temporarily unavailable", is no cause.
    because = f"{hint} ({why}; {pages} in all)" if hint else f"{why} ({pages} in all)"
    error = HandlerError(
        f"{what}{place}: {because}",
        address or None,
        length or None,
    )
    error.__cause__ = source.error if source else OSError(failure.error, failure.text)
    return error
