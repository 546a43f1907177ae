"""`Context`: the tools of a case."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from pyuffd import _memory
from pyuffd._abi import Feature, Ioctl, PageBit, PagefaultFlag, RegisterMode
from pyuffd._closing import SoleOwner
from pyuffd._events import Pagefault
from pyuffd._memory import Interrupted
from pyuffd._uffd import Event, Fork, Userfaultfd
from pyuffd.conformance import _raw, _wording
from pyuffd.conformance._beside import WAIT_S, Access, Child, Monitor, read_until
from pyuffd.conformance._raw import Answer
from pyuffd.conformance._spec import Spec
from pyuffd.conformance._wording import Mismatch, letters, show
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType
from pyuffd.testing._need import Lack, kernel_features
from pyuffd.testing._run import ChildResult, run_child

__all__ = ["WAIT_S", "Access", "Child", "Context", "Mismatch", "Monitor", "letters", "show"]

P = ParamSpec("P")
T = TypeVar("T")

# How long whoever reads the files of a process may hold its memory.
MOMENT_S = 2.0
LOOK_S = 0.001
WP_LETTER = 3
PAGES_SHOWN = 8
EVENTS_SHOWN = 8
SEEN_SHOWN = 40


class Context(SoleOwner):
    """One run of a case on one memory type; everything it makes is undone at the end.

    Attributes:
        case: What the case declares.
        memory: The memory type; for cases that run on "any", anonymous memory.
        page: The page size of that memory.
        uffd: The userfaultfd that `open` made first.
        offered: The kernel's feature bits.
        variant: Which accepted variant was seen, or an empty string.
    """

    uffd: Userfaultfd

    _instead = "it undoes what one run made"

    def __init__(self, case: Spec, memory: str) -> None:
        self.case = case
        self.memory: MemoryType = MEMORY_TYPES.get(memory, MEMORY_TYPES["anon"])
        self.page: int = self.memory.page_size
        self.offered: int = kernel_features()
        self.variant: str = ""
        self._candidates = [
            variant.name for variant in case.variants if variant.possible(self.offered)
        ]
        self._uffds: list[Userfaultfd] = []
        self._regions: list[Region] = []
        self._accesses: list[Access[Any]] = []
        self._monitors: list[Monitor] = []
        self._children: list[Child] = []
        self._seen: list[str] = []
        self._stack = contextlib.ExitStack()

    # Making things

    def make(self, pages: int, memory: str = "") -> Region:
        """Map a region of this many pages, of another memory type if one is named."""
        of = MEMORY_TYPES[memory] if memory else self.memory
        region = of.make(pages * of.page_size)
        self._regions.append(region)
        return region

    def alias(self, region: Region) -> Region:
        """Map a shared region a second time."""
        alias = region.alias()
        self._regions.append(alias)
        return alias

    def open(self, features: Feature | None = None, **options: bool) -> Userfaultfd:
        """Open a userfaultfd with exactly these features; by default with those of the case."""
        if features is None:
            features = self.case.features_on(self.memory)
        uffd = Userfaultfd(features=features, **options)
        if not self._uffds:
            self.uffd = uffd
        self._uffds.append(uffd)
        return uffd

    def register(self, region: Region, mode: RegisterMode, pages: int | None = None) -> Ioctl:
        """Register a region, or its first pages, with `ctx.uffd`; open that first if needed."""
        if not self._uffds:
            self.open()
        length = region.length if pages is None else pages * region.page_size
        return self.uffd.register(region.start, length, mode=mode)

    def enter(self, manager: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context manager that ends with the case, before its regions are unmapped."""
        return self._stack.enter_context(manager)

    def callback(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a function when the case ends, before its regions are unmapped."""
        self._stack.callback(function, *args, **kwargs)

    # Accesses

    def start(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Access[T]:
        """Make a call in a thread; `result()` of the returned object waits for it."""
        access = Access(lambda: call(*args, **kwargs))
        self._accesses.append(access)
        return access

    def read(self, address: int, length: int = 1) -> bytes | Interrupted:
        """Read memory, or return the SIGBUS or SIGSEGV that the read raises; waits for faults."""
        return _memory.guarded_read(address, length)

    def write(self, address: int, data: bytes) -> Interrupted | None:
        """Write memory, or return the SIGBUS or SIGSEGV that the write raises; waits for faults."""
        return _memory.guarded_write(address, data)

    def monitor(self, resolve: Callable[[Event], None], uffd: Userfaultfd | None = None) -> Monitor:
        """Start a thread that reads events and gives each to `resolve`."""
        monitor = Monitor(uffd or self.uffd, resolve)
        self._monitors.append(monitor)
        return monitor

    def fork(self, uffd: Userfaultfd | None = None) -> Child:
        """Fork a child that runs no Python; with EVENT_FORK, read the event of `uffd` meanwhile.

        Raises:
            Mismatch: the first event was not a Fork.
        """
        uffd = uffd or (self._uffds[0] if self._uffds else None)
        if uffd is None or not uffd.features & Feature.EVENT_FORK:
            return self.fork_only()
        child, found = self.fork_with_events(uffd)
        child.uffd = found[0]
        return child

    def fork_with_events(self, *uffds: Userfaultfd) -> tuple[Child, list[Userfaultfd]]:
        """Fork a child that runs no Python; read one event of each of these meanwhile.

        Returns:
            The child, and its own userfaultfd from each event.

        Raises:
            Mismatch: no event, or not a Fork.
        """
        end = os.eventfd(0, os.EFD_CLOEXEC)
        self.callback(os.close, end)
        # They read as long as the fork lasts: it waits for good if its event is not read.
        readers = [self.start(read_until, end, uffd) for uffd in uffds]
        try:
            child = self.fork_only()
        finally:
            os.eventfd_write(end, 1)
        events = [reader.result() for reader in readers]
        for event in events:
            if not isinstance(event, Fork):
                self.fail("the event of the fork", "none" if event is None else event, "Fork")
        return child, [event.uffd for event in events if isinstance(event, Fork)]

    def fork_only(self) -> Child:
        """Fork a child that runs no Python; the caller must read the Fork event, if any."""
        end, child_end = socket.socketpair()
        with child_end:
            agent = _memory.Agent(child_end.fileno(), end.fileno())
        child = Child(lambda address, pid: self.pagemap(address, pid=pid), agent, end)
        self._children.append(child)
        return child

    def run_child(
        self,
        function: Callable[..., Any],
        *args: Any,
        budget_s: float = 10.0,
        expect: Any = 0,
        **kwargs: Any,
    ) -> ChildResult:
        """Run a module-level function in a new Python process; use sparingly, as it takes 0.1 s."""
        return run_child(function, *args, budget_s=budget_s, expect=expect, **kwargs)

    # Expectations

    def expect(self, what: str, seen: object, *wanted: object) -> None:
        """Fail unless `seen` equals one of `wanted`.

        Raises:
            Mismatch: it does not.
        """
        self._seen.append(f"{what}: {show(seen)}")
        if not any(_same(seen, value) for value in wanted):
            self.fail(what, seen, *wanted)

    def until(self, wanted: object, look: Callable[[], T]) -> T:
        """Look again until `wanted` is seen, for a moment; return what was seen last.

        Whoever reads the files of a process (ps, a monitor) holds its memory meanwhile, so that
        it may outlive its process for a moment.
        """
        end = time.monotonic() + MOMENT_S
        while (seen := look()) != wanted and time.monotonic() < end:
            time.sleep(LOOK_S)
        return seen

    def expect_variant(self, what: str, seen: object, **wanted: object) -> str:
        """Fail unless `seen` is what one of the case's variants predicts; return its name.

        Args:
            what: What was looked at.
            seen: What was found.
            **wanted: By the variant's name (`_` for `-`), what it predicts.

        Raises:
            Mismatch: no variant predicts it, or only one that the kernel's features or an earlier
                call rule out.
        """
        self._seen.append(f"{what}: {show(seen)}")
        by_name = {name.replace("_", "-"): value for name, value in wanted.items()}
        if unknown := set(by_name) - {variant.name for variant in self.case.variants}:
            raise LookupError(f"{self.case.name} declares no variants {sorted(unknown)}")
        # If several variants predict the same, all of them remain possible.
        matching = [
            name for name in self._candidates if name in by_name and _same(seen, by_name[name])
        ]
        if not matching:
            possible = {name: by_name[name] for name in self._candidates if name in by_name}
            texts = {name: show(value) for name, value in (possible or by_name).items()}
            self._fail(what, seen, _wording.alternatives(texts))
        self._candidates = matching
        self.variant = matching[0]
        return self.variant

    def expect_fault(
        self,
        flags: PagefaultFlag | int,
        address: int | None = None,
        uffd: Userfaultfd | None = None,
    ) -> Pagefault:
        """Wait for the next message, which must be a page fault with exactly these flags.

        Raises:
            Mismatch: another message, or none in time.
        """
        wanted = f"message {int(flags)}" + ("" if address is None else f" at {address:#x}")
        event = self.expect_event(Pagefault, uffd, wanted)
        if event.flags != flags or (address is not None and event.address != address):
            self.fail("the message", event, wanted)
        return event

    def expect_event(self, kind: type[T], uffd: Userfaultfd | None = None, wanted: str = "") -> T:
        """Wait for the next event, which must be of this class.

        Raises:
            Mismatch: another event, or none in time.
        """
        event = self._read_one(uffd or self.uffd, wanted or kind.__name__)
        self._seen.append(f"event: {show(event)}")
        if not isinstance(event, kind):
            self.fail("the event", event, wanted or kind.__name__)
        return event

    def wait_readable(self, uffd: Userfaultfd | None = None) -> None:
        """Wait until an event is queued, and leave it there.

        Raises:
            Mismatch: none arrived in time.
        """
        if not _readable(uffd or self.uffd, WAIT_S):
            self.fail("messages", f"none within {WAIT_S:g} s", "an event")

    def expect_quiet(self, uffd: Userfaultfd | None = None) -> None:
        """Fail if a message is queued; to be called after an access has completed.

        Raises:
            Mismatch: there is a message.
        """
        uffd = uffd or self.uffd
        if _readable(uffd, 0):
            self.fail("queued messages", uffd.read_events(EVENTS_SHOWN), "none")

    def silently(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that must complete without a message on any userfaultfd of the case.

        Raises:
            Mismatch: a message arrived, or the call did not complete.
        """
        access = self.start(call, *args, **kwargs)
        fds: list[Any] = [access, *(uffd for uffd in self._uffds if not uffd.closed)]
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, event in poll.poll(WAIT_S * 1000) if event & select.POLLIN}
        for uffd in fds[1:]:
            if uffd.fileno() in ready:
                self.fail("messages during the access", uffd.read_events(EVENTS_SHOWN), "none")
        value = access.result()
        for uffd in fds[1:]:
            self.expect_quiet(uffd)
        return value

    def expect_errno(
        self, code: int, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> OSError:
        """Make a call that must fail with this errno; return its exception.

        Raises:
            Mismatch: it succeeded, or failed with another errno.
        """
        wanted = errno.errorcode[code]
        name = getattr(call, "__qualname__", repr(call))
        try:
            value = call(*args, **kwargs)
        except OSError as error:
            self._seen.append(f"{name}: {show(error)}")
            if error.errno != code:
                self.fail(name, error, wanted)
            return error
        self.fail(name, value, wanted)

    def ioctl(self, name: str, *words: int, uffd: Userfaultfd | int | None = None) -> Answer:
        """Make a raw ioctl (`COPY`, `REGISTER`, ...), even with arguments the library refuses."""
        answer = _raw.ioctl(self.uffd if uffd is None else uffd, name, *words)
        self._seen.append(f"UFFDIO_{name}: {answer}")
        return answer

    def pagemap(self, address: int, *, pid: int | None = None) -> str:
        """Return the state of the page at `address`, as `P-FWX`.

        The letters mean: present, swap (also a marker), file or shared anonymous, write-protected
        by userfaultfd, mapped exclusively. A `?` means that this kernel does not say.
        """
        text = letters(self.bits(address, pid=pid))
        return text if self._shows_protection else text[:WP_LETTER] + "?" + text[WP_LETTER + 1 :]

    def bits(self, address: int, *, pid: int | None = None) -> PageBit:
        """Return the pagemap bits of the page at `address`."""
        with Pagemap(pid) as pagemap:
            return pagemap.read(address, 4096).at(address)

    def is_protected(self, address: int, *, pid: int | None = None) -> bool:
        """Return whether bit 57 of pagemap is set, for the page or its marker.

        Raises:
            Lack: this kernel does not report the bit.
        """
        if not self._shows_protection:
            self.lack("PM_UFFD_WP", "needs bit 57 of pagemap")
        return PageBit.UFFD_WP in self.bits(address, pid=pid)

    def expect_pagemap(self, address: int, *wanted: str, pid: int | None = None) -> None:
        """Fail unless the page's state is one of `wanted`, in which `?` matches any letter.

        Raises:
            Mismatch: it is none of them.
        """
        seen = self.pagemap(address, pid=pid)
        self._seen.append(f"pagemap {address:#x}: {seen}")
        if not any(_fits(seen, pattern) for pattern in wanted):
            self.fail(f"pagemap of {address:#x}", seen, *wanted)

    def note(self, text: str) -> None:
        """Remember an observation, to be printed if the case fails."""
        self._seen.append(text)

    def lack(self, key: str, reason: str) -> NoReturn:
        """Skip the case because hardware or a feature is missing, never because of a behaviour."""
        raise Lack([key], f"{reason}; the kernel offers {self.offered:#x}")

    def fail(self, what: str, seen: object, *wanted: object) -> NoReturn:
        """Fail with what was seen and what was wanted."""
        texts = [value if isinstance(value, str) else show(value) for value in wanted]
        self._fail(what, seen, " or ".join(dict.fromkeys(texts)))

    def _fail(self, what: str, seen: object, wanted: str) -> NoReturn:
        shown = seen if isinstance(seen, str) else show(seen)
        raise Mismatch(_wording.places(f"{what}: saw {shown}, expected {wanted}", self._regions))

    @property
    def _shows_protection(self) -> bool:
        # No feature bit tells; this one was added in the same release.
        return bool(self.offered & Feature.MINOR_SHMEM)

    # The end of a run

    def describe(self) -> str:
        """Return the state of everything the case made, for the report of a failure."""
        lines = [f"feature mask {self.offered:#x}, enabled " + self._enabled()]
        for number, region in enumerate(self._regions):
            if region.closed:
                continue
            pages = min(region.length // region.page_size, PAGES_SHOWN)
            states = []
            for index in range(pages):
                with contextlib.suppress(OSError):
                    states.append(self.pagemap(region.start + index * region.page_size))
            name = f"region {number}: " if len(self._regions) > 1 else ""
            lines.append(f"{name}{region!r}: {' '.join(states)}")
        for uffd in self._uffds:
            if not uffd.closed and _readable(uffd, 0):
                queued = f"queued: {[show(event) for event in uffd.read_events(EVENTS_SHOWN)]}"
                lines.append(_wording.places(queued, self._regions))
        if self._seen:
            seen = (_wording.places(line, self._regions) for line in self._seen[-SEEN_SHOWN:])
            lines += ["seen, in order:", *(f"  {line}" for line in seen)]
        return "\n".join(lines)

    def _enabled(self) -> str:
        return ", ".join(f"{int(uffd.features):#x}" for uffd in self._uffds) or "nothing"

    def release(self) -> None:
        """Undo everything made so far, so that the case can start over."""
        self.close()
        for made in (self._regions, self._accesses, self._uffds, self._monitors, self._children):
            made.clear()

    def close(self) -> None:
        """Undo everything: children, userfaultfds (so stalled threads continue), regions."""
        with contextlib.ExitStack() as stack:
            for region in self._regions:
                stack.callback(region.close)
            for access in self._accesses:
                stack.callback(access.close)
            for uffd in self._uffds:
                stack.callback(uffd.close)
            for monitor in self._monitors:
                stack.callback(monitor.close)
            for child in self._children:
                stack.callback(child.close)
            stack.push(self._stack)

    def _read_one(self, uffd: Userfaultfd, wanted: str = "an event") -> Event:
        deadline = time.monotonic() + WAIT_S
        while _readable(uffd, max(deadline - time.monotonic(), 0)):
            if events := uffd.read_events(1):
                return events[0]
        self.fail("messages", f"none within {WAIT_S:g} s", wanted)


def _readable(uffd: Userfaultfd, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(timeout_s * 1000))


def _same(seen: object, wanted: object) -> bool:
    if isinstance(seen, str) and isinstance(wanted, str):
        return _fits(seen, wanted)
    return seen == wanted


def _fits(seen: str, pattern: str) -> bool:
    return len(seen) == len(pattern) and all(
        "?" in (want, have) or want == have for have, want in zip(seen, pattern, strict=True)
    )
