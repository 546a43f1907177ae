"""What a build needs, checked before cffi starts; a lack is one sentence saying what to install.

It imports the standard library only, so that the Makefile runs it with a bare interpreter as
well.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# What the C includes beyond the C library: Python.h comes with cffi's generated code, futex.h
# with the engine.
_PROBE = "#include <Python.h>\n#include <sys/mman.h>\n#include <linux/futex.h>\n"


def problem() -> str | None:
    """Return the sentence that ends the build, or None if it can continue."""
    machine, pointer_bits = platform.machine(), 64 if sys.maxsize > 2**32 else 32
    if sys.platform != "linux" or machine != "x86_64" or pointer_bits != 64:
        return (
            "pyuffd supports 64-bit Python on x86-64 Linux only; "
            f"this is a {pointer_bits}-bit Python on {machine or 'an unknown CPU'} {sys.platform}."
        )
    if sys.version_info < (3, 11):
        return f"pyuffd needs Python 3.11 or newer; this is {platform.python_version()}."
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        return (
            f"pyuffd needs a C compiler and found no {compiler[0]}: install gcc and python3-dev "
            "(Debian and Ubuntu: apt-get install gcc python3-dev)."
        )
    includes = list(dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude")))
    if not any(Path(folder, "Python.h").is_file() for folder in includes):
        return (
            f"pyuffd needs Python's C headers and found no Python.h in {' or '.join(includes)}: "
            "install python3-dev (Debian and Ubuntu: apt-get install gcc python3-dev)."
        )
    probe = subprocess.run(
        [*compiler, "-x", "c", "-fsyntax-only", *(f"-I{folder}" for folder in includes), "-"],
        input=_PROBE,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if probe.returncode != 0:
        reason = next((line for line in probe.stderr.splitlines() if "error" in line), "it failed")
        return (
            f"pyuffd needs a working C compiler with the C library's headers; {compiler[0]} said "
            f"'{reason.strip()}': install gcc, libc6-dev and python3-dev "
            "(Debian and Ubuntu: apt-get install gcc libc6-dev python3-dev)."
        )
    return None


if __name__ == "__main__":
    sys.exit(problem())
