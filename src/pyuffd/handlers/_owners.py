"""The owners of the memory that a handler's userfaultfds govern (layer L4)."""

from __future__ import annotations

import errno
import os

from pyuffd import _memory, lowlevel
from pyuffd._abi import Feature
from pyuffd._arguments import check_pid
from pyuffd._errors import ProcessGoneError, UffdOSError, raise_errno
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE, RangeLike
from pyuffd._uffd import Userfaultfd

# The last page of user memory, which is never registered, so that an ioctl on it has no effect.
PROBE_ADDRESS = 0x7FFF_FFFF_E000


class Owners:
    """The owners of one handler's userfaultfds, each checked before it is used.

    It raises ValueError for what would act on the wrong process, or read its memory.
    """

    def __init__(self, driver: str, on_error: str) -> None:
        self._driver = driver
        self._kills = on_error == "kill"
        self._pids: dict[Userfaultfd, int] = {}
        self._seen: set[Userfaultfd] = set()  # those whose memory was found in the owner

    def add(self, uffd: Userfaultfd, given: int | None = None) -> int:
        """Note a userfaultfd's owner and return its pid; 0 if that is unknown.

        Args:
            uffd: The userfaultfd.
            given: The pid that the user gave; by default the userfaultfd's `owner_pid`.

        Raises:
            ValueError: an impossible pid, or the owner must be known and is not.
            ProcessGoneError: there is no such process, but the memory still exists.
        """
        pid = _checked(uffd, given)
        if self._driver == "inline" and pid != os.getpid():
            raise ValueError(
                f"the inline driver resolves faults of this process's own threads, but {uffd!r}"
                f" governs the memory of {_named(pid)}: use a userfaultfd without Feature.SIGBUS"
                " and driver='native'"
            )
        if self._kills:
            _check_kill(uffd, pid)
        self._pids[uffd] = pid
        return pid

    def forget(self, uffd: Userfaultfd) -> None:
        """Forget a userfaultfd that is closed."""
        self._pids.pop(uffd, None)
        self._seen.discard(uffd)

    def of(self, uffd: Userfaultfd) -> int:
        """Return the pid of a userfaultfd's owner, 0 if unknown."""
        return self._pids[uffd]

    def are_here(self, uffd: Userfaultfd) -> bool:
        """Return whether the userfaultfd governs the memory of this process."""
        return self._pids[uffd] == os.getpid()

    def check_serving(self, uffd: Userfaultfd, reads_owner: bool, finds_holes: bool) -> None:
        """Raise ValueError if serving requires a known owner and it is unknown."""
        if self._pids[uffd]:
            return
        if reads_owner:
            raise ValueError(
                f"preserve= needs local=, a mapping of the same memory in this process, or the"
                f" owner of {uffd!r}, which is unknown: set owner_pid to the process that opened it"
            )
        if finds_holes:
            raise ValueError(
                "Linux silently leaves missing pages of anonymous memory unprotected, and the owner"
                f" of {uffd!r} is unknown: set owner_pid to the process that opened it, or let the"
                " owner open it with Feature.WP_UNPOPULATED"
            )

    def verify(self, uffd: Userfaultfd, region: RangeLike, *, needed: bool = False) -> None:
        """Check once, if it matters, that the owner has registered the region.

        Raises:
            ValueError: the process has not registered such memory.
            UffdPermissionError: EACCES - no permission to inspect the process.
        """
        pid = self._pids[uffd]
        if not (needed or self._kills) or self.are_here(uffd) or uffd in self._seen:
            return
        try:
            facts = _memory.look_at(pid, region.start, region.length, all_facts=True)
            is_registered = bool(facts & _memory.Maps.REGISTERED)
        except UffdOSError as error:
            if error.errno != errno.EFAULT:
                raise
            is_registered = False
        if not is_registered:
            raise ValueError(
                f"process {pid} has not registered [{region.start:#x}, +{region.length:#x}), but"
                f" {uffd!r} has: the process does not own that memory. Set owner_pid to the process"
                " that opened the userfaultfd"
            )
        self._seen.add(uffd)


def _named(pid: int) -> str:
    return f"process {pid}" if pid else "an unknown process"


def _checked(uffd: Userfaultfd, given: int | None) -> int:
    pid = uffd.owner_pid
    if given is not None:
        check_pid("owner_pid", given)
        if not uffd.adopted and given != pid:
            raise ValueError(
                f"owner_pid {given}: {uffd!r} was opened by process {pid} and governs its memory"
            )
        pid = given
    if pid is None:
        return 0
    if pid != os.getpid():
        _check_process(uffd, pid)
    return pid


def _check_process(uffd: Userfaultfd, pid: int) -> None:
    try:
        Descriptor.of_process(pid).close()
    except ProcessLookupError:
        if not _is_orphaned(uffd):
            raise_errno(
                f"owner_pid {pid}",
                errno.ESRCH,
                hint=f"the memory that {uffd!r} governs still exists, so another process owns it",
            )
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        raise ValueError(f"owner_pid {pid} is a thread: pass the id of its process") from error


def _is_orphaned(uffd: Userfaultfd) -> bool:
    """Return whether the memory that a userfaultfd governs is gone."""
    try:
        lowlevel.writeprotect(uffd.fileno(), PROBE_ADDRESS, PAGE_SIZE, 0)
    except ProcessGoneError:
        return True
    except UffdOSError:
        return False
    return False


def _check_kill(uffd: Userfaultfd, pid: int) -> None:
    if not pid:
        raise ValueError(
            f"on_error='kill' needs the owner of {uffd!r}, which is unknown: set owner_pid to the"
            " process that opened it"
        )
    if not uffd.features & Feature.EVENT_FORK:
        return
    if not uffd.features & Feature.THREAD_ID:
        raise ValueError(
            "on_error='kill' with Feature.EVENT_FORK needs Feature.THREAD_ID, which tells which"
            " fork touched a page"
        )
    if pid != os.getpid() and _namespace(pid) != _namespace(os.getpid()):
        raise ValueError(
            f"on_error='kill' with Feature.EVENT_FORK: process {pid} is in another PID namespace,"
            " so the thread ids in its faults mean nothing here"
        )


def _namespace(pid: int) -> tuple[int, int] | None:
    try:
        status = os.stat(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
    return status.st_dev, status.st_ino
