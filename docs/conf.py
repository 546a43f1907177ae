"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import argparse
import builtins
import importlib
import os
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import pyuffd
import pyuffd.cli
import pyuffd.lowlevel
import pyuffd.testing

HERE = Path(__file__).resolve().parent

project = "pyuffd"
author = "the pyuffd authors"
copyright = author
release = version = pyuffd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"pyuffd {release}"
html_static_path = ["_static"]
html_css_files = ["pyuffd.css"]
html_theme_options = {"navigation_with_keys": True}
# Pages show which language a block is in; one without a language is a shell or a diagram.
highlight_language = "none"
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["deflist", "attrs_inline", "attrs_block", "colon_fence"]
myst_heading_anchors = 4

# Docstrings write `Region` for a name of Python, as help() shows it.
default_role = "py:obj"
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

# Filled at the end of this file: the site is built without the network.
intersphinx_mapping: dict[str, tuple[str, str]] = {}
# Each class in a signature leads somewhere; `region` and other arguments lead nowhere.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(?!class).*", ".*"),
    # Constructors of objects that users only get.
    ("py:class", r"pyuffd\.(.*\.)?_.*|Placed|Options"),
]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
# What a prompt copies beside its line: see tests/_sessions.py.
copybutton_line_continuation_character = "\\"
copybutton_here_doc_delimiter = "EOF"

# "Kernel: ...  GIL: ...  Threads: ...  Blocks: ..." at the end of a docstring, in one paragraph.
FACTS = ("Kernel", "GIL", "Threads", "Blocks")
FACT = re.compile(rf"(?:^|(?<=\s))({'|'.join(FACTS)}):\s+")


def facts_as_fields(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turn the paragraph of facts of a docstring into fields, one a line."""
    result: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        result += _fields(paragraph) if _is_facts(paragraph) else paragraph
        result.append("")
        paragraph = []
    lines[:] = result


def _is_facts(paragraph: list[str]) -> bool:
    return bool(paragraph) and paragraph[0].startswith(tuple(f"{fact}:" for fact in FACTS))


def _fields(paragraph: list[str]) -> list[str]:
    parts = FACT.split(" ".join(line.strip() for line in paragraph))[1:]
    names, texts = parts[::2], parts[1::2]
    return [f":{name}: {text.strip()}" for name, text in zip(names, texts, strict=True)]


def _as_of_a_method(self: Any) -> list[str]:
    """Read an attribute's docstring: napoleon takes what is before a colon for its type."""
    self._what = "method"
    self._parse()
    return []


GoogleDocstring._parse_attribute_docstring = _as_of_a_method


def leave_out_sequences(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leave out what sequences inherit."""
    inherited = (tuple.count, tuple.index, Sequence.count, Sequence.index)
    return True if any(obj is each for each in inherited) else None


def _public() -> dict[str, str]:
    names = {}
    for module in (pyuffd.testing, pyuffd):
        names.update({name: f"{module.__name__}.{name}" for name in module.__all__})
    return names


PUBLIC = _public()


def find_public_name(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> Any:
    """Resolve `Handler`, `Handler.stop` and `_uffd.Userfaultfd` to the public name's page.

    Names of types that are not public, such as `RangeLike`, lead to the glossary of types.
    """
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    objects = env.get_domain("py").objects
    for at, part in enumerate(parts):
        if part in PUBLIC:
            target = ".".join([PUBLIC[part], *parts[at + 1 :]])
            if target in objects and app.builder is not None:
                found = objects[target]
                return make_refnode(
                    app.builder, node["refdoc"], found.docname, found.node_id, contnode, target
                )
    term = env.get_domain("std").objects.get(("term", parts[-1]))
    if term and app.builder is not None:
        return make_refnode(app.builder, node["refdoc"], *term, contnode, parts[-1])
    return None


def leave_builtins_alone(app: Sphinx, doctree: nodes.document) -> None:
    """Show `bytes` and `int` as they are: methods of that name are not meant."""
    for node in list(doctree.findall(pending_xref)):
        if node.get("refdomain") == "py" and hasattr(builtins, node["reftarget"]):
            node.replace_self(node.children)


INVENTORY = """# Sphinx inventory version 2
# Project: {}
# Version:
# The remainder of this file is compressed using zlib.
"""


def write_inventories(folder: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Write what `external.toml` tells of other projects' names as files for intersphinx."""
    folder.mkdir(parents=True, exist_ok=True)
    for project, entry in tomllib.loads((HERE / "external.toml").read_text()).items():
        lines = ""
        for name, (role, page, *anchor) in entry["names"].items():
            lines += f"{name} py:{role} 1 {page}#{anchor[0] if anchor else name} -\n"
        file = folder / f"{project}.inv"
        file.write_bytes(INVENTORY.format(project).encode() + zlib.compress(lines.encode()))
        yield project, (entry["url"], str(file))


intersphinx_mapping.update(write_inventories(HERE.parent / "build" / "inventories"))


class Commands(SphinxDirective):
    """The help of every command, as this version prints it."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        os.environ["COLUMNS"] = "80"
        parser = argparse.ArgumentParser(prog="pyuffd")
        subparsers = parser.add_subparsers()
        for module, _ in pyuffd.cli.COMMANDS.values():
            importlib.import_module(module).add_parser(subparsers)
        text = "".join(
            f"## `{each.prog}`\n\n```text\n{each.format_help()}```\n\n"
            for each in _with_actions(subparsers)
        )
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _with_actions(group: argparse._SubParsersAction[Any]) -> Iterator[argparse.ArgumentParser]:
    for parser in group.choices.values():
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _with_actions(action)


def setup(app: Sphinx) -> None:
    """Connect what this file adds to autodoc and to references."""
    # Before napoleon, which would take the fields for a part of the section above them.
    app.connect("autodoc-process-docstring", facts_as_fields, priority=400)
    app.connect("autodoc-skip-member", leave_out_sequences)
    app.connect("missing-reference", find_public_name)
    app.connect("doctree-read", leave_builtins_alone)
    app.add_directive("commands", Commands)
