"""What pyproject.toml cannot say: checks before the build, the C extension, the wheel's tag."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build_checks import problem

if sentence := problem():
    sys.exit(sentence)

options: dict[str, dict[str, str]] = {}
# A free-threaded interpreter has no stable ABI: its wheel carries its own tag.
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    options["bdist_wheel"] = {"py_limited_api": "cp311"}
# setuptools reuses what it built before; a sanitizer's objects must not end up in a wheel.
if sanitizer := os.environ.get("PYUFFD_SANITIZE"):
    options["build"] = {"build_base": f"build/sanitize-{sanitizer}"}

setup(cffi_modules=["csrc/build_shim.py:ffibuilder"], options=options)
