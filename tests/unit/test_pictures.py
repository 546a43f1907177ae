"""The pictures of the site are what their program draws from today's results."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET

from tests import _readme

DRAW = _readme.DOCS / "pictures" / "draw.py"


def test_the_pictures_are_up_to_date() -> None:
    """`python docs/pictures/draw.py` writes them."""
    drawn = dict(runpy.run_path(str(DRAW))["pictures"]())
    assert sorted(drawn) == sorted(DRAW.parent.glob("*.svg"))
    for path, text in drawn.items():
        assert path.read_text() == text, path.name
        ET.fromstring(text)


def test_every_picture_is_shown_in_both_themes() -> None:
    pages = "".join(page.read_text() for page in _readme.PAGES)
    for path in DRAW.parent.glob("*.svg"):
        assert f"pictures/{path.name}" in pages


def test_the_table_of_speed_is_up_to_date() -> None:
    """README shows what RESULTS.md has; the program that draws the pictures writes it too."""
    drawing = runpy.run_path(str(DRAW))
    assert drawing["SPEED_TABLE"].findall(_readme.README.read_text()) == [drawing["speed_table"]()]
