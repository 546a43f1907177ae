"""Helper processes that start clean, whatever the program did to its signals (layer L4).

An ignored signal and the mask of blocked ones outlive execve(2): without this a program that
ignores SIGCHLD would have a keeper that cannot wait for its worker.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys

# An ignored one of these cannot be waited for, or is not what the signal is for.
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
# What Python ignores from its start.
_PYTHON_IGNORES = {signal.SIGPIPE, signal.SIGXFSZ}


def clean_keeper(stderr: int) -> None:
    """Ignore what could end the keeper, and give it our standard error."""
    _set(signal.SIGCHLD, signal.SIG_DFL)
    for number in SIGNALS:
        _set(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A descriptor for every region and two for every fork: the usual 1,024 are soon gone.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.stderr.flush()
    source = stderr if stderr >= 0 else os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(source, 2)
    os.close(source)


def clean_worker() -> None:
    """Let signals be what they are for the user's code and what it starts.

    SIGINT and SIGHUP are for the program, which stops the worker itself.
    """
    for number in SIGNALS:
        _set(number, signal.SIG_IGN if number in _PYTHON_IGNORES else signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        # Not ignored: what a page source starts would ignore it, too.
        signal.signal(number, lambda *_: None)


def _set(number: int, action: signal.Handlers) -> None:
    with contextlib.suppress(OSError, ValueError):  # those that the C library keeps for itself
        signal.signal(number, action)
