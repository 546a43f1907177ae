"""What pyproject.toml cannot say: checks before the build, the C extension, the wheel's tag."""

from __future__ import annotations

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build_checks import problem

if sentence := problem():
    sys.exit(sentence)

# Imported when the platform is known to be right: it asks for the platform itself.
from setuptools.command.build_ext import build_ext


class ParallelBuild(build_ext):
    """Compile the extension's files on all CPUs; setuptools would take one after the other."""

    def build_extensions(self) -> None:
        """Have the compiler run for several files at a time."""
        compile_files = self.compiler.compile

        def compile_parallel(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_files([source], **options), sources)
                return [each for some in objects for each in some]

        self.compiler.compile = compile_parallel
        super().build_extensions()


options: dict[str, dict[str, str]] = {}
# A free-threaded interpreter has no stable ABI: its wheel carries its own tag.
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    options["bdist_wheel"] = {"py_limited_api": "cp311"}
# setuptools reuses what it built before; a sanitizer's objects must not end up in a wheel.
if sanitizer := os.environ.get("PYUFFD_SANITIZE"):
    options["build"] = {"build_base": f"build/sanitize-{sanitizer}"}

setup(
    cffi_modules=["csrc/build_shim.py:ffibuilder"],
    cmdclass={"build_ext": ParallelBuild},
    options=options,
)
