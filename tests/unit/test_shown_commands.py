"""Commands, options, extras, targets and files that the pages and messages name exist."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator

import pyuffd.cli
from tests import _readme

ROOT = _readme.ROOT
PAGES = [
    *_readme.PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "changes").glob("*.md")),
]
HAND_WRITTEN = [page for page in PAGES if "generated" not in page.parts]
SOURCES = sorted(ROOT.glob("src/pyuffd/**/*.py"))

SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(
    r"^```(?:console|text)\n(.*?)^```$|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"(?<![\w./-])pyuffd ([a-z][a-z-]+)((?: [^\n`#|]*)?)")
OPTION = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
MAKE = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*make ([a-z][a-z-]*)")
EXTRA = re.compile(r"pyuffd\[([\w,]+)\]")
FOLDERS = "tests|docs|examples|benchmarks|csrc|src|changes|release"
FILE = re.compile(rf"(?<![\w/.*-])(?:{FOLDERS})/[\w./*-]*\w")
TEST_FILE = re.compile(r"(?<![\w/.])test_\w+\.py")


def code(text: str) -> Iterator[str]:
    """Yield what a page shows as code: spans, and lines of blocks that are not programs."""
    yield from SPAN.findall(text)
    for fenced, indented in BLOCK.findall(text):
        yield from (fenced or indented).splitlines()


def options() -> dict[str, set[str]]:
    """Return the options of each command; those of its own commands are among them."""
    parser = argparse.ArgumentParser(prog="pyuffd")
    subparsers = parser.add_subparsers()
    for module, _ in pyuffd.cli.COMMANDS.values():
        importlib.import_module(module).add_parser(subparsers)
    return {name: set(_options(each)) for name, each in subparsers.choices.items()}


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _options(each)


def test_the_commands_and_options_shown_exist() -> None:
    known = options()
    wrong, seen = [], 0
    for page in [*PAGES, *SOURCES]:
        for line in code(page.read_text()):
            for command, rest in COMMAND.findall(line):
                # Prose of a message, or the import of a module.
                if command not in known:
                    wrong += (
                        [f"{page.name}: pyuffd {command}"] if line.startswith("pyuffd ") else []
                    )
                    continue
                seen += 1
                unknown = set(OPTION.findall(rest)) - known[command]
                wrong += [f"{page.name}: pyuffd {command} {option}" for option in unknown]
    assert wrong == []
    assert seen > 50


def test_the_targets_of_make_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for line in code(page.read_text())
        for target in MAKE.findall(line.strip())
    }
    assert named - targets == set()
    assert len(named) > 10


def test_the_extras_shown_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    named = {
        extra
        for file in [*PAGES, *SOURCES]
        for extras in EXTRA.findall(file.read_text())
        for extra in extras.split(",")
    }
    assert named <= known
    # Each is on the page about installing.
    install = (_readme.DOCS / "start" / "install.md").read_text()
    assert {extra for extra in known if f"[{extra}]" in install} == known


def test_the_files_shown_exist() -> None:
    lost = []
    for page in HAND_WRITTEN:
        for span in SPAN.findall(page.read_text()):
            lost += [
                f"{page.name}: {name}" for name in FILE.findall(span) if not any(ROOT.glob(name))
            ]
            lost += [
                f"{page.name}: {name}"
                for name in TEST_FILE.findall(span)
                if not any(ROOT.glob(f"{top}/**/{name}") for top in ("tests", "src"))
            ]
    assert lost == []


def test_sessions_are_console_blocks() -> None:
    """`$ ` begins a command that tests/process/test_sessions.py runs, with these exceptions."""
    loose = re.compile(r"^(?:    )?\$ ", re.MULTILINE)
    console = re.compile(r"^```console\n.*?^```$", re.MULTILINE | re.DOTALL)
    found = {
        str(page.relative_to(ROOT))
        for page in HAND_WRITTEN
        if loose.search(console.sub("", page.read_text()))
    }
    # `make qemu` and `make criu` run what these show.
    assert found <= {"docs/qemu.md", "docs/criu.md"}


def test_the_json_shown_is_json() -> None:
    found = [
        json.loads(block)
        for page in HAND_WRITTEN
        for block in re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert found


def test_the_c_shown_compiles() -> None:
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    blocks = [
        block
        for page in HAND_WRITTEN
        for block in re.findall(r"^```c\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        command = [*compiler, "-Wall", "-Werror", "-fsyntax-only", "-x", "c", "-"]
        subprocess.run(command, input=block, text=True, check=True)


def test_no_page_is_a_dead_end() -> None:
    """Each page leads to another one; those that include a file of the root have its links."""
    pages = [page for page in _readme.DOCS.rglob("*.md") if "{include}" not in page.read_text()]
    assert [page for page in pages if "](" not in page.read_text()] == []
