"""Write `src/pyuffd/_shim.pyi`, the types of the compiled module, from `uffd_shim.cdef`.

`make dev` runs it; a unit test fails when the committed file is not what it writes.
"""

from __future__ import annotations

import re
from keyword import iskeyword
from pathlib import Path
from typing import Any

from pycparser import c_ast, c_parser

HERE = Path(__file__).resolve().parent
CDEF = HERE / "uffd_shim.cdef"
STUB = HERE.parent / "src" / "pyuffd" / "_shim.pyi"

HEADER = '''\
"""Types of the compiled module, written by csrc/build_stub.py from uffd_shim.cdef."""

from typing import Any

# A pointer: what ffi.new, ffi.from_buffer and ffi.cast return, or bytes.
CData = Any

ffi: Any

class _Lib:
'''
_TYPES = "int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t ssize_t bool"
_TYPEDEFS = "".join(f"typedef int {name};\n" for name in _TYPES.split())


def _python_type(node: Any) -> str:
    if isinstance(node, (c_ast.PtrDecl, c_ast.ArrayDecl)):
        return "CData"
    names = getattr(node.type, "names", ["int"])
    return "None" if names == ["void"] else "float" if names[0] in {"double", "float"} else "int"


def _function(name: str, node: Any) -> str:
    declared = [item for item in (node.args.params if node.args else []) if item.name]
    arguments = [
        f"{item.name}{'_' * iskeyword(item.name)}: {_python_type(item.type)}" for item in declared
    ]
    listed = ", ".join(["self", *arguments, "/"])
    result = _python_type(node.type)
    line = f"    def {name}({listed}) -> {result}: ...\n"
    if len(line) <= 101:
        return line
    wrapped = f"        {listed}\n"
    if len(wrapped) > 101:
        wrapped = "".join(f"        {part},\n" for part in ["self", *arguments, "/"])
    return f"    def {name}(\n{wrapped}    ) -> {result}: ...\n"


def members(cdef: str) -> dict[str, str]:
    """Return the lines that declare each name of the compiled module's `lib`."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", cdef, flags=re.DOTALL)
    constants = re.findall(r"^#define\s+(\w+)", text, re.MULTILINE)
    lines = {name: f"    {name}: int\n" for name in constants}
    code = re.sub(r"^#.*$|\.\.\.;|,\s*\.\.\.\s*(?=\})", "", text, flags=re.MULTILINE)
    for item in c_parser.CParser().parse(_TYPEDEFS + code).ext:
        if not isinstance(item, c_ast.Decl):
            continue
        if isinstance(item.type, c_ast.FuncDecl):
            lines[item.name] = _function(item.name, item.type)
        elif isinstance(item.type, c_ast.Enum) and item.type.values:
            for value in item.type.values.enumerators:
                lines[value.name] = f"    {value.name}: int\n"
        elif item.name:
            lines[item.name] = f"    {item.name}: {_python_type(item.type)}\n"
    return lines


def stub() -> str:
    """Return the text of the stub."""
    return HEADER + "".join(members(CDEF.read_text()).values()) + "\nlib: _Lib\n"


if __name__ == "__main__":
    STUB.write_text(stub())
