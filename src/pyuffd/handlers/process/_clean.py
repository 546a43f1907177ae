"""Reset the signals of the helper processes, whatever the program did to its own (layer L4).

Ignored signals and the mask of blocked ones outlive execve(2). Without this the keeper of a program
that ignores SIGCHLD could not wait for its worker process.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys

# These cannot be ignored, or must not be.
_LEFT_ALONE = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCONT,
    signal.SIGCHLD,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
}
SIGNALS = signal.valid_signals() - _LEFT_ALONE
# Python ignores these from its start.
_PYTHON_IGNORES = {signal.SIGPIPE, signal.SIGXFSZ}


def clean_keeper(stderr: int) -> None:
    """Ignore the signals that could end the keeper, and give it the program's standard error."""
    _set(signal.SIGCHLD, signal.SIG_DFL)
    for number in SIGNALS:
        _set(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # The usual limit of 1,024 is low for a descriptor for every region and two for every fork.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.stderr.flush()
    source = stderr if stderr >= 0 else os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(source, 2)
    os.close(source)


def clean_worker() -> None:
    """Restore the default actions, for the user's code and the processes that it starts.

    SIGINT and SIGHUP have no effect: the program receives them and stops the worker process.
    """
    for number in SIGNALS:
        _set(number, signal.SIG_IGN if number in _PYTHON_IGNORES else signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN, which processes that a page source starts would inherit.
        signal.signal(number, lambda *_: None)


def _set(number: int, action: signal.Handlers) -> None:
    with contextlib.suppress(OSError, ValueError):  # some are reserved by the C library
        signal.signal(number, action)
