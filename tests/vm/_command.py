"""The command `run`: run pytest on another kernel, with the user's arguments."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.vm import _debian, _image, _run


def find_kernel(name: str) -> Path:
    """Return the kernel of a path or a version.

    Raises:
        _debian.KernelNotFoundError: there is no such kernel.
    """
    if Path(name).exists():
        return Path(name)
    if re.fullmatch(r"[0-9.]+", name):
        return _debian.kernel(name)
    raise _debian.KernelNotFoundError(f"there is no kernel {name}")


def from_outside(arguments: Sequence[str], root: Path) -> tuple[list[str], dict[str, bytes]]:
    """Return pytest's arguments, with paths outside the repository absolute, and those files.

    For a test file these include the conftest.py in its folder.
    """
    changed: list[str] = []
    files: dict[str, bytes] = {}
    for argument in arguments:
        name, colons, rest = argument.partition("::")
        path = Path(name).absolute()
        # An expression for -k may be too long for a file name, so that stat(2) fails.
        if argument.startswith("-") or not os.path.exists(path) or path.is_relative_to(root):
            changed.append(argument)
            continue
        changed.append(f"{path}{colons}{rest}")
        found = [path, path.parent / "conftest.py"] if path.is_file() else path.rglob("*")
        for file in found:
            if file.is_file() and "__pycache__" not in file.parts:
                files[str(file)] = file.read_bytes()
    return changed, files


def _options() -> argparse.Namespace:
    statuses = ", ".join(f"{status:d} {status.name.lower()}" for status in _run.Status)
    parser = argparse.ArgumentParser(
        prog="run",
        description="Run pytest on another kernel.",
        epilog=f"Exit status: pytest's (0 to 5), or {statuses}.",
    )
    parser.add_argument("--output", type=Path, help="folder for the files (build/vm/KERNEL)")
    parser.add_argument("--memory", type=int, default=_run.MEMORY_MIB, help="MiB, plus huge pages")
    parser.add_argument("--huge-pages", type=int, default=_run.HUGE_PAGES, help="number, of 2 MiB")
    parser.add_argument("--swap", type=int, default=_run.SWAP_MIB, help="MiB")
    parser.add_argument("--run-limit", type=float, default=_run.RUN_S, help="s, on real hardware")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of the guest (races need two)")
    parser.add_argument(
        "--accel",
        help=f"QEMU's -accel (${_run.ACCEL}, or tcg with a thread for each of several CPUs)",
    )
    parser.add_argument(
        "--with", action="append", default=[], dest="packages", help="installed package to pack"
    )
    parser.add_argument("kernel", help="a vmlinuz or bzImage, or a released version such as 6.12")
    parser.add_argument(
        "pytest", nargs=argparse.REMAINDER, help="pytest's arguments (the conformance suite)"
    )
    return parser.parse_args()


def main() -> int:
    """Run `run`."""
    options = _options()
    _run.end_with_us()
    if sentence := _run.lacking():
        # Checked before anything is fetched.
        absent = shutil.which(_run.QEMU) is None
        return _fail(_run.Status.QEMU_ABSENT if absent else _run.Status.HOST_LACKS, sentence)
    try:
        kernel = find_kernel(options.kernel)
        given, files = from_outside(options.pytest, _run.ROOT)
        accel = options.accel or _run.accel(options.cpus)
        arguments, wanted = _run.redirect(given or list(_run.SUITE))
        guest = _run.Guest(
            kernel=kernel,
            folder=(options.output or _run.ROOT / "build/vm" / kernel.name).resolve(),
            memory_mib=options.memory,
            huge_pages=options.huge_pages,
            swap_mib=options.swap,
            accel=accel,
            cpus=options.cpus,
            scale=_run.scale(accel),
            run_s=options.run_limit,
            packages=tuple(options.packages),
            files=files,
            show=_show,
        )
        result = guest.pytest(*arguments)
    except _debian.KernelNotFoundError as error:
        return _fail(_run.Status.NO_SUCH_KERNEL, str(error))
    except _image.MissingOnHostError as error:
        return _fail(_run.Status.HOST_LACKS, str(error))
    if result.sentence:
        return _fail(result.status, result.sentence)
    for name, path in wanted.items():
        if (result.folder / name).exists():
            shutil.copy(result.folder / name, path)
    print(
        f"run: {kernel.name}: status {result.status}, up after {result.boot_s:.1f} s, "
        f"{result.wall_s:.1f} s in all",
        file=sys.stderr,
    )
    # The paths that pytest printed are those in the guest.
    for name in _run.FILES:
        if (result.folder / name).exists():
            print(f"run: {result.folder / name}", file=sys.stderr)
    return result.status


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def _fail(status: int, sentence: str) -> int:
    print(f"run: {sentence}", file=sys.stderr)
    return int(status)
