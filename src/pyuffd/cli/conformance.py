"""`pyuffd conformance`: run the kernel conformance suite, list it, compare reports (layer L6)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pyuffd.conformance import Report, compare, load, markdown

EXIT_SAME = 0
EXIT_DIFFERENT = 1
EXIT_ERROR = 2
EXIT_NO_CASE = 5  # pytest's
EXIT_NOTHING_CHECKED = 77

_VERDICTS = {
    0: "passed: no case failed, and those that were skipped lack something here",
    1: "failed: at least one case did, or the kernel logged a WARN or BUG",
    EXIT_NO_CASE: "nothing was run",
    EXIT_NOTHING_CHECKED: "skipped: nothing was checked",
}
_ARGUMENTS = ("-p", "pyuffd.conformance.plugin", "-p", "no:cacheprovider", "-q", "-W", "error")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `conformance` command."""
    parser = subparsers.add_parser(
        "conformance",
        description="Check what this kernel does with userfaultfd, case by case.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run_ = actions.add_parser(
        "run",
        help="run the cases",
        description="Run the cases with pytest (pip install pyuffd[testing]). Exit status: 0 if all"
        " passed or were skipped because something is missing, 1 if one failed or the kernel logged"
        f" a WARN or BUG, {EXIT_NOTHING_CHECKED} if all were skipped; others are pytest's."
        " PYUFFD_TESTS=require turns skips into failures.",
    )
    run_.add_argument("-k", metavar="EXPR", help="only the cases whose ids match, as pytest's -k")
    run_.add_argument("-n", metavar="N", help="run in N processes (pytest-xdist)")
    run_.add_argument("--report", metavar="FILE", help="write FILE.json and FILE.html")
    run_.add_argument("--slow", action="store_true", help="run the slow cases too")
    run_.add_argument("pytest_args", nargs="*", metavar="ARG", help="pytest arguments, after --")
    list_ = actions.add_parser("list", help="list the cases", description="List the cases' ids.")
    list_.add_argument("--markdown", action="store_true", help="print the page of all cases")
    diff = actions.add_parser(
        "diff",
        help="compare two reports",
        description="Print the differences between two JSON reports, one id per line. Exit status:"
        " 0 if there are none, 1 if there are some, 2 if a report cannot be read.",
    )
    diff.add_argument("before", metavar="A")
    diff.add_argument("after", metavar="B")


def run(args: argparse.Namespace) -> int:
    """Run the requested action; return the exit status."""
    match args.action:
        case "run":
            return _run(args)
        case "list":
            return _list(args)
        case _:
            return _diff(args)


def _run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("pytest") is None:
        print(
            "pyuffd: running the suite needs pytest: pip install 'pyuffd[testing]'", file=sys.stderr
        )
        return EXIT_ERROR
    if args.n is not None and importlib.util.find_spec("xdist") is None:
        print(
            "pyuffd: -n needs pytest-xdist: pip install 'pyuffd[testing]', or run without -n",
            file=sys.stderr,
        )
        return EXIT_ERROR
    if args.pytest_args and not args.pytest_args[0].startswith("-"):
        word = args.pytest_args[0]
        print(f"pyuffd: {word!r}: to choose cases, pass -k {word!r}", file=sys.stderr)
        return EXIT_ERROR
    if args.report is not None and not Path(args.report).resolve().parent.is_dir():
        print(f"pyuffd: --report {args.report}: there is no such folder", file=sys.stderr)
        return EXIT_ERROR
    if args.report is not None and not os.access(Path(args.report).resolve().parent, os.W_OK):
        print(f"pyuffd: --report {args.report}: the folder cannot be written", file=sys.stderr)
        return EXIT_ERROR
    suite = importlib.util.find_spec("pyuffd.conformance.test_suite")
    assert suite is not None
    assert suite.origin is not None
    # Do not use the configuration of the project in the working directory.
    with tempfile.TemporaryDirectory(prefix="pyuffd-") as folder:
        configuration = Path(folder, "pytest.ini")
        configuration.write_text("[pytest]\n")
        arguments = [suite.origin, *_ARGUMENTS, "-c", str(configuration), "--uffd-reserve"]
        arguments.append("--uffd-nonempty")
        if args.k is not None:
            arguments += ["-k", args.k]
        if args.n is not None:
            arguments += ["-n", args.n]
        if args.slow:
            arguments.append("--uffd-slow")
        if args.report is not None:
            arguments.append(f"--uffd-report={os.path.abspath(args.report)}")
        # In a new process: pytest must be imported before the modules that it tests.
        command = [sys.executable, "-P", "-m", "pytest", *arguments, *args.pytest_args]
        status = subprocess.run(command, check=False).returncode
    if status == EXIT_NO_CASE:
        print(
            f"pyuffd: no case matches -k {args.k!r}; `pyuffd conformance list` lists the cases",
            file=sys.stderr,
        )
    if status == EXIT_NOTHING_CHECKED:
        print(
            "pyuffd: nothing was checked: every case lacks something (the reasons are above); the"
            " suite needs a userfaultfd, and most of it root",
            file=sys.stderr,
        )
    print(f"pyuffd: {_VERDICTS.get(status, 'the run was not complete')} (exit status {status})")
    return status


def _list(args: argparse.Namespace) -> int:
    cases = load()
    if args.markdown:
        print(markdown(cases), end="")
    else:
        for case in cases.values():
            for name in case.ids:
                print(f"{name:70} {case.summary}")
    return EXIT_SAME


def _diff(args: argparse.Namespace) -> int:
    try:
        before, after = Report.read(_named(args.before)), Report.read(_named(args.after))
    except ValueError as error:
        print(f"pyuffd: {error}", file=sys.stderr)
        return EXIT_ERROR
    for what, old, new in (
        ("kernel", before.kernel["release"], after.kernel["release"]),
        ("feature mask", hex(before.features), hex(after.features)),
    ):
        print(f"{what}: {old}" + ("" if old == new else f" -> {new}"))
    differences = compare(before, after)
    for difference in differences:
        print(f"{difference.id}: {difference.before} -> {difference.after}")
    print(f"{len(differences) or 'no'} results differ, of {len(after.results)}")
    return EXIT_DIFFERENT if differences else EXIT_SAME


def _named(path: str) -> str:
    """Return the path, or the JSON file that `--report PATH` wrote."""
    whole = Path(path + ".json")
    return str(whole) if not Path(path).exists() and whole.exists() else path
