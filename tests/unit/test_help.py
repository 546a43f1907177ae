"""What `help()` prints: each member of each enum is described, and int's methods are left out."""

from __future__ import annotations

import copy
import enum
import pickle
import pydoc
import subprocess
import sys

import pytest

import pyuffd
from pyuffd import lowlevel
from pyuffd._enums import Flag, Number, Word

ENUMS = [
    cls
    for module in (pyuffd, lowlevel)
    for name in dir(module)
    if isinstance(cls := getattr(module, name), enum.EnumType) and not name.startswith("_")
    if cls not in (Flag, Number, Word)
]
ENUM = pytest.mark.parametrize("cls", ENUMS, ids=lambda cls: cls.__name__)


def test_public_enums_are_found() -> None:
    assert {pyuffd.Feature, pyuffd.PageState, pyuffd.RegionKind, lowlevel.FillOp} <= set(ENUMS)


@ENUM
def test_every_member_is_described(cls: type[enum.Enum]) -> None:
    lacking = [name for name, member in cls.__members__.items() if member.__doc__ == cls.__doc__]
    assert lacking == []
    assert [name for name, member in cls.__members__.items() if not member.__doc__] == []


@ENUM
def test_help_shows_the_descriptions_and_no_arithmetic(cls: type[enum.Enum]) -> None:
    text = pydoc.plain(pydoc.render_doc(cls))
    for member in cls.__members__.values():
        assert all(line in text for line in str(member.__doc__).splitlines())
    assert "Attributes:" not in text
    assert [
        name for name in ("__add__", "__divmod__", "bit_length", "__xor__") if name in text
    ] == []


@ENUM
def test_members_survive_pickling_with_their_description(cls: type[enum.Enum]) -> None:
    for member in cls.__members__.values():
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member


def test_help_of_the_package_has_no_arithmetic_and_no_sums_of_flags() -> None:
    text = pydoc.plain(pydoc.render_doc(pyuffd))
    assert "__divmod__" not in text
    lines = [
        line for line in text.splitlines() if "= <" in line and "|" in line.partition("= <")[2]
    ]
    assert [line for line in lines if "|" in line.partition("= <")[2].partition(">")[0]] == []


def test_entries_of_several_lines_are_joined() -> None:
    class Colour(Number):
        """Colours.

        Attributes:
            RED: The first line
                and the second.
            BLUE: One.
        """

        RED = 1
        BLUE = 2

    assert (Colour.__doc__, Colour.RED.__doc__) == ("Colours.", "The first line\nand the second.")
    assert Colour.BLUE.__doc__ == "One."


def test_a_description_of_no_member_is_refused() -> None:
    with pytest.raises(KeyError, match="GREEN"):

        class Colour(Number):
            """Colours.

            Attributes:
                GREEN: Not there.
            """

            RED = 1


def test_works_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-c", "import pyuffd; print(int(pyuffd.Feature.SIGBUS))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "128\n"
