"""Enums whose members are documented, for `help()` as for editors (layer L1).

The class docstring describes each member under "Attributes:", where editors and people who read
the source find it.  At run time each description is its member's own `__doc__`, which `help()`
prints beside the value; `dir()` and `help()` leave out what every int can do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import KEEP, Enum, EnumType, IntEnum, IntFlag
from typing import Any

_HEADING = "\n\nAttributes:\n"
_SHOWN = {"__class__", "__doc__", "__members__"}


class DocumentedEnum(EnumType):
    """The type of enums that hand the descriptions in their docstring on to their members."""

    def __new__(metacls, *args: Any, **kwargs: Any) -> DocumentedEnum:
        """Make the class, then move its "Attributes:" to the members."""
        cls = super().__new__(metacls, *args, **kwargs)
        text, heading, attributes = inspect.cleandoc(cls.__doc__ or "").partition(_HEADING)
        if heading:
            cls.__doc__ = text
            members: Mapping[str, Enum] = cls.__members__
            for name, description in _descriptions(attributes).items():
                members[name].__doc__ = description
        return cls

    def __dir__(cls) -> list[str]:
        """Return the members, and what a class of members has to offer."""
        own = {name for name in vars(cls) if not name.startswith("_")}
        return sorted(_SHOWN | own | set(cls.__members__))


def _descriptions(attributes: str) -> dict[str, str]:
    """Return the entries `name: text`, whose further lines are indented more."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(attributes).splitlines():
        if line[:1].isspace():
            found[name] = f"{found[name]}\n{line.strip()}"
        else:
            name, _, first = line.partition(":")
            found[name] = first.strip()
    return found


class Flag(IntFlag, metaclass=DocumentedEnum, boundary=KEEP):
    """Bits of the kernel's; those without a name here are kept, printed and passed on."""


class Number(IntEnum, metaclass=DocumentedEnum):
    """Numbers with names."""


class Word(Enum, metaclass=DocumentedEnum):
    """Words with names."""
