"""uffd_shim.cdef, _shim.pyi and the compiled module have the same names."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyuffd import _shim
from tests._child import ROOT

STUB = ROOT / "src" / "pyuffd" / "_shim.pyi"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_stub", ROOT / "csrc" / "build_stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub_names() -> set[str]:
    (lib,) = (
        node
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "_Lib"
    )
    functions = {item.name for item in lib.body if isinstance(item, ast.FunctionDef)}
    constants = {ast.unparse(item.target) for item in lib.body if isinstance(item, ast.AnnAssign)}
    return functions | constants


def test_stub_is_what_the_cdef_gives() -> None:
    assert STUB.read_text() == load_generator().stub(), "run make dev"


def test_stub_names_are_the_compiled_names() -> None:
    assert stub_names() == set(dir(_shim.lib))


@pytest.mark.parametrize(
    ("cdef", "expected"),
    [
        ("#define A ...\n#define B 3", {"A": "    A: int\n", "B": "    B: int\n"}),
        (
            "/* int no(void); */ int f(const char *path, uint64_t n);",
            {"f": "    def f(self, path: CData, n: int, /) -> int: ...\n"},
        ),
        ("void g(void);", {"g": "    def g(self, /) -> None: ...\n"}),
        ("struct s { int a; ...; };", {}),
        ("enum e { X, Y, ... };", {"X": "    X: int\n", "Y": "    Y: int\n"}),
        ("struct t *h(struct s *s);", {"h": "    def h(self, s: CData, /) -> CData: ...\n"}),
    ],
)
def test_generator(cdef: str, expected: dict[str, str]) -> None:
    assert load_generator().members(cdef) == expected


def test_compiled_module_is_the_tree_s_own() -> None:
    has_own = sysconfig.get_config_var("Py_GIL_DISABLED")
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if has_own else ".abi3.so"
    assert Path(_shim.__file__).name == f"_shim{suffix}"


def test_structures_are_those_of_the_headers() -> None:
    ffi: Any = _shim.ffi
    text = (ROOT / "csrc" / "uffd_shim.cdef").read_text()
    names = re.findall(r"^struct (\w+) \{$", text, re.MULTILINE)
    assert "uffd_fill" in names
    for name in names:
        ffi.sizeof(f"struct {name}")  # raises where the header says otherwise
