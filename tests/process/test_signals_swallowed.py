"""A signal ends a command although a finalizer, or somebody else, swallows its exception."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from pyuffd.cli._signals import Ended, ended_by
from tests._child import limit_s

LIMIT_S = 60
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A command that swallows the signal, and runs until something else ends it.
COMMAND = """
import contextlib, gc, signal, sys, time, types, weakref
from pyuffd import cli
from pyuffd.cli._signals import ended_by

number = signal.Signals(int(sys.argv[1]))

class Object:
    def __del__(self):
        if wanted in ("finalizer", "lost alarm"):
            signal.raise_signal(number)
        if wanted == "finalizer that fails":
            try:
                signal.raise_signal(number)
            finally:
                raise ZeroDivisionError
        if wanted == "hook":
            raise ZeroDivisionError

def callback(*_):
    gc.callbacks.clear()
    signal.raise_signal(number)

def hook(_):
    print("hook", file=sys.stderr)
    if wanted == "hook":
        signal.raise_signal(number)

def swallow():
    object_ = Object()
    if wanted == "weakref":
        reference = weakref.ref(object_, callback)
        del object_
    if wanted == "gc":
        gc.callbacks.append(callback)
        gc.collect()
    if wanted == "except":
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)

def run(_):
    if wanted == "ignored":
        signal.signal(number, signal.SIG_IGN)
    if wanted == "lost alarm":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    with ended_by(signal.SIGTERM, signal.SIGHUP):
        swallow()
        if wanted == "lost alarm":  # as if it arrived just before sleep() begins
            signal.sigwait([signal.SIGALRM])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        if wanted == "ignored":
            signal.raise_signal(number)
        elif wanted != "except":
            time.sleep(1000)
    return 0

wanted = sys.argv[2]
sys.unraisablehook = hook
module = types.ModuleType("command_of_the_test")
module.add_parser = lambda subparsers: subparsers.add_parser("swallow")
module.run = run
sys.modules[module.__name__] = module
cli.COMMANDS["swallow"] = (module.__name__, "")
sys.exit(cli.main(["swallow"]))
"""


@pytest.mark.crossing
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("finalizer", ""),
        ("lost alarm", ""),
        ("finalizer that fails", "hook\n"),
        ("weakref", ""),
        ("gc", ""),
        ("hook", "hook\n"),
        ("except", ""),
    ],
)
@pytest.mark.parametrize("number", SIGNALS)
def test_swallowed(number: signal.Signals, where: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(int(number)), where],
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert (done.returncode, done.stderr) == (128 + number, said)


DEMO = """
import signal, sys, time
from pyuffd.cli import demo, main

class Object:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))

def take_snapshot(*_):
    Object()
    time.sleep(1000)

demo.take_snapshot = take_snapshot
sys.exit(main(["demo", "--size", "2"]))
"""


# The helper that takes a snapshot of the process which started it.
HELPER = """
import os, signal, sys, time
from pyuffd.snapshot import _helper

class Object:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))

def work(*_):
    if len(sys.argv) > 2:  # the first alarm arrives just before sleep() begins
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    Object()
    if len(sys.argv) > 2:
        signal.sigwait([signal.SIGALRM])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    time.sleep(1000)

_helper._work = work
_helper.main(-1, os.getppid())
"""


@pytest.mark.parametrize(
    ("program", "number", "more"),
    [
        pytest.param(DEMO, signal.SIGHUP, [], id="demo"),
        pytest.param(HELPER, signal.SIGTERM, [], id="helper"),
        pytest.param(HELPER, signal.SIGTERM, ["lost alarm"], id="helper-lost alarm"),
    ],
)
def test_programs(program: str, number: signal.Signals, more: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number)), *more],
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert (done.returncode, done.stderr) == (128 + number, "")


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and in the background of a shell."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(int(signal.SIGHUP)), "ignored"],
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def default_actions() -> Iterator[None]:
    """The actions of a program that has set none."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.usefixtures("default_actions")
def test_everything_is_as_before_afterwards() -> None:
    def handlers() -> list[object]:
        return [sys.unraisablehook, *map(signal.getsignal, (*SIGNALS, signal.SIGALRM))]

    before = handlers()
    for ends in (False, True):
        with pytest.raises(Ended) if ends else nullcontext(), ended_by(signal.SIGINT):
            with ended_by(signal.SIGTERM, signal.SIGHUP):
                assert handlers() != before
                if ends:
                    signal.raise_signal(signal.SIGTERM)
            assert handlers() != before
        assert handlers() == before
