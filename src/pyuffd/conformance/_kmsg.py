"""The kernel's log while the suite runs."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

_RECORD_BYTES = 8192  # the most that one read of /dev/kmsg can return
KERNEL = 0  # the kernel's facility; programs that write to /dev/kmsg have others
_WARNING = 4  # KERN_WARNING; smaller numbers are worse
# What the kernel prints when it detects a bug or corruption in itself.
_FATAL = re.compile(
    r"WARNING: |\bBUG: |kernel BUG at|Oops|general protection fault|Bad page (map|state|cache)"
    r"|blocked for more than|soft lockup|hard LOCKUP|self-detected stall|detected stalls"
    r"|list_(add|del) corruption|VM_(BUG|WARN)|refcount_t: "
)
# Messages about what tests do on purpose, and how a report names them.
_EXPECTED = (
    (
        "memory errors that poison simulates",
        re.compile(r"^(mce: )?(MCE: Killing|Memory failure: )|hardware memory corruption"),
    ),
    ("faults that could not be retried", re.compile(r"FAULT_FLAG_ALLOW_RETRY missing")),
    ("processes out of memory", re.compile(r"oom[-_ ]kill|Out of memory|out of memory")),
    ("swap areas that came and went", re.compile(r"set_capacity_and_notify|^zram\d+:|swap area")),
)


def expected(text: str) -> str:
    """Return what a record is about, if tests cause it on purpose, or ""."""
    return next((what for what, pattern in _EXPECTED if pattern.search(text)), "")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the log."""

    sequence: int
    facility: int
    priority: int
    text: str

    @property
    def is_warning(self) -> bool:
        """Whether its level is warning or worse, or it says that the kernel is broken."""
        return self.facility == KERNEL and (self.priority <= _WARNING or self.is_fatal)

    @property
    def is_fatal(self) -> bool:
        """Whether it says that the kernel is broken."""
        return self.facility == KERNEL and _FATAL.search(self.text) is not None


class Kmsg:
    """Read what the kernel logs from now on; nothing if this user may not read it."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
        else:
            os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def readable(self) -> bool:
        """Whether the log can be read."""
        return self._fd >= 0

    def read(self) -> list[Record]:
        """Return the records since the last call."""
        records: list[Record] = []
        while self._fd >= 0:
            try:
                raw = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:  # a record was overwritten before it was read
                    raise
                continue
            records.append(parse(raw.decode(errors="replace")))
        return records

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def parse(raw: str) -> Record:
    """Parse `priority,sequence,time,flags;text` (Documentation/ABI/testing/dev-kmsg)."""
    head, _, text = raw.partition(";")
    priority, sequence = head.split(",")[:2]
    return Record(int(sequence), int(priority) >> 3, int(priority) & 7, text.partition("\n")[0])
