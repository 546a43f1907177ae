"""Programs as users start them: a file, a module, -c, standard input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tests._child import limit_s

How = Literal["file", "-c", "stdin", "-m", "folder"]
LIMIT_S = 30.0


def without_cloudpickle(folder: Path) -> str:
    """Return a path entry that hides cloudpickle."""
    hiding = folder / "hiding"
    hiding.mkdir(exist_ok=True)
    (hiding / "cloudpickle.py").write_text('raise ImportError("not installed")\n')
    return str(hiding)


def command_line(folder: Path, program: str, how: How) -> list[str]:
    """Write a program to its place, and return the command that starts it."""
    if how == "-c":
        return ["-c", program]
    if how == "stdin":
        return ["-"]
    if how == "folder":
        (folder / "application").mkdir()
        (folder / "application" / "__main__.py").write_text(program)
        return ["application"]
    (folder / "script.py").write_text(program)
    return ["-m", "script"] if how == "-m" else ["script.py"]


def run_program(
    folder: Path,
    program: str,
    *,
    how: How = "file",
    cloudpickle: bool = True,
    flags: Sequence[str] = (),
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `options` are those of subprocess.run."""
    environment = {**os.environ, **(env or {})}
    if not cloudpickle:
        path = [without_cloudpickle(folder), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    started = [sys.executable, *flags, *command_line(folder, program, how), *arguments]
    return subprocess.run(
        started,
        cwd=folder,
        env=environment,
        input=program if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=limit_s(LIMIT_S),
        check=False,
        **options,
    )
