"""The shim's functions and structures, all built while there is one thread (layer L0).

cffi builds each when it is used first. The garbage collector may run meanwhile and let another
thread go on; if that one builds the same, an assertion of cffi ends the process (measured: cffi
2.1.1, realize_c_type.c). `pyuffd` imports this module before any that uses the shim.
"""

from __future__ import annotations

from pyuffd._shim import ffi, lib

__all__ = ["ffi", "lib"]


def _build_all() -> None:
    for name in dir(lib):
        getattr(lib, name)
    for name in ffi.list_types()[1]:
        kind = ffi.typeof(f"struct {name}")
        try:
            ffi.sizeof(kind)
        except ffi.error:  # it is opaque
            continue
        kind.fields  # noqa: B018 - looking at them builds them


_build_all()
