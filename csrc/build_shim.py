"""Build `pyuffd._shim`: the only place that knows how the C is compiled (cffi, API mode)."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants paths relative to the project root, where the build runs.
SOURCES = sorted(f"csrc/{path.relative_to(HERE)}" for path in HERE.rglob("*.c"))
HEADERS = sorted(f"csrc/{path.relative_to(HERE)}" for path in HERE.rglob("*.h"))

CFLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror=implicit-function-declaration",
    "-pthread",
    "-fvisibility=hidden",
]
if os.environ.get("PYUFFD_WERROR") == "1":
    CFLAGS.append("-Werror")
if sysconfig.get_config_var("Py_GIL_DISABLED") and sys.version_info < (3, 15):
    # cffi defines it on the command line and again in the C that it writes: a warning.
    CFLAGS.append("-U_CFFI_NO_LIMITED_API")
SANITIZE = os.environ.get("PYUFFD_SANITIZE", "")
LDFLAGS = ["-pthread"]
if SANITIZE:
    CFLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"]
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "uffd_shim.cdef").read_text())
ffibuilder.set_source(
    "pyuffd._shim",
    "".join(f'#include "{Path(name).relative_to("csrc")}"\n' for name in HEADERS),
    sources=SOURCES,
    include_dirs=["csrc"],
    depends=[*HEADERS, "csrc/uffd_shim.cdef"],
    extra_compile_args=CFLAGS,
    extra_link_args=LDFLAGS,
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
