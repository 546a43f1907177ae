"""Write the files of a report: its JSON form and its HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from pyuffd.conformance._html import html
from pyuffd.conformance._report import Report


def write_report(report: Report, path: str | os.PathLike[str]) -> list[Path]:
    """Write FILE.json and FILE.html, also if `path` has one of these suffixes; return both."""
    named = Path(path)
    stem = named.with_suffix("") if named.suffix in (".json", ".html") else named
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".html")]
    for target, text in zip(paths, (report.to_json(), html(report)), strict=True):
        target.write_text(text, encoding="utf-8")
    return paths
