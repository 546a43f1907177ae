"""Write all Python tracebacks from C when no Python thread can run (layer L4).

`faulthandler` writes them in a signal handler that needs no GIL. The engine has the handler run
where it can do no harm (csrc/engine/tracebacks.h).
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys

from pyuffd.handlers.process._start import is_inherited

log = logging.getLogger(__name__)


def stall_signal() -> int:
    """Return a signal on which faulthandler writes all tracebacks; 0 if there is none."""
    if _chosen:
        return _chosen[0]
    # Without a standard error, descriptor 2 may be another file.
    if sys.__stderr__ is None or not is_inherited(2):
        return 0
    numbers = range(signal.SIGRTMAX, signal.SIGRTMIN, -1)
    for number in sorted(numbers, key=lambda number: signal.getsignal(number) is signal.SIG_IGN):
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            continue
        try:
            faulthandler.register(number, file=sys.__stderr__, all_threads=True)
        except (AttributeError, OSError, RuntimeError, ValueError) as error:
            log.debug("no tracebacks of stalled threads: %s", error)  # stderr cannot be written
            return 0
        _chosen.append(number)
        return number
    return 0


_chosen: list[int] = []
