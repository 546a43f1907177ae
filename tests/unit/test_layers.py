"""The layer rule: a module imports its own layer or a lower one."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "pyuffd"

# By module or folder below pyuffd. The package itself exports from every layer: only the top may
# import it.
LAYERS = [
    {"_shim", "_realized"},
    {"_abi", "_enums", "_errors", "_pages"},
    {"lowlevel", "_memory", "_owned", "_uffd", "probe", "pagemap"},
    {"regions"},
    {"sources", "handlers", "handover"},
    {
        *("conformance", "dirty", "snapshot", "migration", "pager", "remote", "integrations"),
        *("criu", "testing"),
    },
    {"cli", "__main__", ""},
]
# Within a layer: the suite is built on the kit; snapshots on tracking, which is built on `Process`.
BELOW = {"testing": "conformance", "remote": "dirty", "dirty": "snapshot"}
MAY_IMPORT_SHIM = {
    *(
        "_realized",
        "_owned",
        "_rows",
        "_polling",
        "lowlevel",
        "_memory",
        "_remote_calls",
        "_dirty_calls",
        "_image_calls",
    ),
    "_saver_calls",
    *("handlers._engine", "handlers._engine_calls", "handlers._engine_pages"),
    *("handlers._engine_reports", "handlers._range_spec", "handlers._sigbus", "handlers._types"),
    "handlers.process._successor",
}
MAY_NOT_IMPORT_LOWLEVEL = LAYERS[5] | LAYERS[6] - {""}


def layer(name: str) -> int:
    """Return a module's layer: by the table, or for a private helper by its docstring."""
    part = name.partition(".")[0]
    for number, members in enumerate(LAYERS):
        if part in members:
            return number
    stated = stated_layer(part)
    if part.startswith("_") and stated is not None:
        return stated
    raise AssertionError(f"pyuffd.{name} has no layer: add it to design.md and to LAYERS")


@cache
def stated_layer(part: str) -> int | None:
    """Return the layer that a module's or folder's docstring names as `layer L2`."""
    path = SOURCE / part
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.exists():
        return None
    found = re.search(r"layer L(\d)", ast.get_docstring(ast.parse(path.read_text())) or "")
    return int(found[1]) if found else None


def modules() -> Iterator[tuple[str, Path]]:
    """Yield every module's name below pyuffd ("" is the package itself) and its file."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield what a file imports of pyuffd, for types and in functions too, by name below it."""
    full = f"pyuffd.{name}".rstrip(".")
    package = full if path.name == "__init__.py" else full.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            found = [
                f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base
                for alias in node.names
            ]
        else:
            continue
        for target in found:
            if target == "pyuffd" or target.startswith("pyuffd."):
                yield target.removeprefix("pyuffd").removeprefix(".")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the statements of a tree, the bodies of `if TYPE_CHECKING:` included."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most of a tree, and no import is in one
            yield from statements(child)


@cache
def is_module(dotted: str) -> bool:
    head, *rest = dotted.split(".")
    place = SOURCE.joinpath(*rest)
    # The compiled module has no source beside it.
    return head == "pyuffd" and (
        dotted == "pyuffd._shim" or place.with_suffix(".py").exists() or place.is_dir()
    )


def words_of_design() -> set[str]:
    """Return the words in code of the table of layers in docs/design.md."""
    text = (SOURCE.parents[1] / "docs" / "design.md").read_text()
    table = text[text.index("| layer |") :].partition("\n\n")[0]
    return {word for code in re.findall(r"`([^`]+)`", table) for word in re.findall(r"\w+", code)}


def circles(every: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the edges that are on a circle, or between two."""
    while True:
        sources, targets = {source for source, _ in every}, {target for _, target in every}
        kept = {(a, b) for a, b in every if a in targets and b in sources}
        if kept == every:
            return every
        every = kept


@cache
def edges() -> list[tuple[str, str]]:
    """Return each import, as the names of two modules; parsing all of them needs a second."""
    return [(name, target) for name, path in modules() for target in imports(name, path)]


def test_design_names_every_module() -> None:
    """In its table of layers, by module or folder."""
    parts = {name.partition(".")[0] for name, _ in modules()} - {"", "__main__"}
    assert parts - words_of_design() == set()


def test_the_walk_finds_the_package() -> None:
    assert {"", "_abi", "lowlevel"} <= {name for name, _ in modules()}
    assert ("lowlevel", "_shim") in edges()


@pytest.mark.parametrize(
    "part", sorted({name.partition(".")[0] for name, _ in modules()} - {"", "__main__"})
)
def test_docstring_states_the_layer(part: str) -> None:
    assert stated_layer(part) == layer(part)


def upward(every: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports of a higher layer."""
    every = list(every)
    layers = {name: layer(name) for edge in every for name in edge}
    return {(name, target) for name, target in every if layers[target] > layers[name]}


def test_imports_only_its_own_layer_or_lower() -> None:
    assert upward(edges()) == set()


def test_an_import_of_a_higher_layer_would_be_found(tmp_path: Path) -> None:
    """Wherever it is: at the top, in a function, or for types only."""
    copy = tmp_path / "_uffd.py"
    copy.write_text(
        "from pyuffd.handlers import _handler\n"
        "if TYPE_CHECKING:\n    from pyuffd.snapshot import Snapshot\n"
        + (SOURCE / "_uffd.py").read_text().replace("from __future__ import annotations\n", "")
        + "def later() -> None:\n    import pyuffd.cli\n"
    )
    found = upward(("_uffd", target) for target in imports("_uffd", copy))
    assert {target.partition(".")[0] for _, target in found} == {"handlers", "snapshot", "cli"}


@pytest.mark.parametrize(("lower", "upper"), BELOW.items())
def test_order_within_a_layer(lower: str, upper: str) -> None:
    against = {
        (name, target)
        for name, target in edges()
        if name.partition(".")[0] == lower and target.partition(".")[0] == upper
    }
    assert against == set()


def test_no_circles() -> None:
    """Imports inside functions and those for types only included."""
    assert circles(set(edges())) == set()


def test_a_circle_would_be_found() -> None:
    found = {("a", "b"), ("b", "c"), ("c", "b"), ("b", "d"), ("e", "e")}
    assert circles(found) == {("b", "c"), ("c", "b"), ("e", "e")}


def test_only_some_modules_import_the_compiled_module() -> None:
    importers = {name for name, target in edges() if target == "_shim"}
    assert importers <= MAY_IMPORT_SHIM


def test_tools_and_commands_do_not_use_lowlevel() -> None:
    importers = {name for name, target in edges() if target == "lowlevel"}
    tools = {name for name in importers if name.partition(".")[0] in MAY_NOT_IMPORT_LOWLEVEL}
    assert tools == set()


def test_commands_use_public_names_only() -> None:
    private = {
        (name, target)
        for name, target in edges()
        if name.partition(".")[0] == "cli"
        and not target.startswith("cli")
        and any(part.startswith("_") for part in target.split("."))
    }
    assert private == set()
