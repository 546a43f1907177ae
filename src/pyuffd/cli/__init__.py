"""The command line, `pyuffd COMMAND ...`: one module per command, public API only (layer L6).

A command's module has `add_parser(subparsers)`, which adds the parser named like the command, and
`run(args)`, which returns the exit status.  It is imported only when its command is used.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import pyuffd
from pyuffd.cli._signals import Ended, ended_by, restore

COMMANDS = {
    "conformance": (
        "pyuffd.cli.conformance",
        "check what this kernel does with userfaultfd, case by case, and compare kernels",
    ),
    "doctor": (
        "pyuffd.cli.doctor",
        "report what this kernel and this user can do, and what is missing",
    ),
    "track": (
        "pyuffd.cli.track",
        "show what a running process writes, by mapping, live",
    ),
    "core": (
        "pyuffd.cli.core",
        "write an ELF core of a running process, which continues to run",
    ),
    "snapshot": (
        "pyuffd.cli.snapshot",
        "write the memory of a running process, as it is at one instant, to a directory",
    ),
    "info": ("pyuffd.cli.info", "describe a snapshot: its process, memory and working sets"),
    "verify": ("pyuffd.cli.verify", "check a snapshot and its parents"),
    "flatten": ("pyuffd.cli.flatten", "make one snapshot of an incremental one and its parents"),
    "restore-bench": (
        "pyuffd.cli.restore_bench",
        "restore a snapshot by each method, and show how long each takes",
    ),
    "criu-lazy-pages": (
        "pyuffd.cli.criu_lazy_pages",
        "serve the pages of `criu restore --lazy-pages`, in place of `criu lazy-pages`",
    ),
    "demo": (
        "pyuffd.cli.demo",
        "write a point-in-time snapshot of a running process and restore it lazily",
    ),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: The arguments after the program's name. By default those of this process, which is
            then expected to exit: signals that arrived too late to end the command stay ignored.

    Returns:
        The command's exit status; 2 after a usage error or an expected error, such as a closed
        stdout (`pyuffd doctor >&-`), which is written to stderr in one sentence; 130 after Ctrl-C;
        128 + N after another signal N on which the command ends cleanly; 141 if the reader of
        stdout is gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:
        print("pyuffd: standard output is closed: cannot print the result", file=sys.stderr)
        return EXIT_ERROR
    try:
        with ended_by(signal.SIGINT):
            status = _run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise buffered text would raise again when the interpreter flushes stdout at exit.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Ended as ended:
        return ended.status
    except (pyuffd.UffdError, OSError) as error:
        print(f"pyuffd: {_sentence(error)}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        if argv is None:
            # Skip the interpreter's final collections: they take longer than many commands, and
            # only free what the end of the process frees anyway.
            gc.freeze()
        else:
            restore()
    return status


def _run(arguments: list[str]) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="pyuffd", description="userfaultfd: page faults handled in user space."
    )
    parser.add_argument("--version", action="version", version=f"pyuffd {pyuffd.__version__}")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    module = None
    for name, (module_name, help_) in COMMANDS.items():
        if name == command:
            module = importlib.import_module(module_name)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=help_)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as exit_:  # --help, --version, or a usage error argparse has printed
        return int(exit_.code or 0)
    assert module is not None  # parse_args accepts no other command
    return int(module.run(args))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        return error.strerror
    return str(error)
