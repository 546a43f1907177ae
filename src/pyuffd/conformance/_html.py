"""The report as one HTML page without links, to read and to mail."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pyuffd.conformance._report import FAILED, MEMORY, PASSED, SKIPPED, Report, cell_text

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; } th, td { padding: 2px 8px; border: 1px solid #ddd; }
th { text-align: left; position: sticky; top: 0; background: #fff; }
td.passed { background: #d9f2d9; } td.failed { background: #f8c4c4; font-weight: bold; }
td.skipped { background: #eee; color: #666; } td.none { border-color: #f4f4f4; }
code, pre { font: 12px/1.35 ui-monospace, monospace; } pre { background: #f7f7f7; padding: 8px; }
small { color: #666; } .broken { color: #b00020; font-weight: bold; }
"""


def html(report: Report) -> str:
    """Return the page."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    counts = report.counts()
    title = f"userfaultfd conformance on Linux {report.kernel['release']}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
    yield f"</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
    yield (
        f"<p>{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped."
        f" {escape(report.kernel['version'])}, {escape(report.kernel['machine'])};"
        f" pyuffd {escape(report.pyuffd_version)}.</p>"
    )
    yield f"<p>Feature mask <code>{report.features:#x}</code>:"
    yield f"{escape(', '.join(report.feature_names()))}</p>"
    yield from _messages(report)
    yield from _matrix(report)
    yield from _failures(report)
    yield "<h2>Skipped, by reason</h2><ul>"
    for reason, count in report.skip_reasons().most_common():
        yield f"<li>{count}: {escape(reason)}</li>"
    yield "</ul></body></html>"


def _messages(report: Report) -> Iterator[str]:
    yield "<h2>Kernel log</h2><ul>"
    if not report.log_readable:
        yield "<li>could not be read: a kernel WARN would not have been seen</li>"
    elif not report.messages:
        yield "<li>no warning appeared</li>"
    for message in report.messages:
        kind = ' class="broken"' if message.is_fatal else ""
        tests = escape(" and ".join(message.tests))
        yield f"<li{kind}><code>{escape(message.text)}</code> <small>while {tests} ran</small></li>"
    yield "</ul>"


def _matrix(report: Report) -> Iterator[str]:
    rows = report.matrix()
    shown = [name for name in MEMORY if any(name in row for row in rows.values())]
    heads = "".join(f"<th>{escape(name)}</th>" for name in shown)
    yield f"<h2>Behaviour by memory type</h2><table><tr><th>case</th>{heads}</tr>"
    for name, row in rows.items():
        summary = escape(next(iter(row.values())).summary)
        cells = ""
        for memory in shown:
            result = row.get(memory)
            kind = "none" if result is None else result.outcome
            hint = "" if result is None else f' title="{escape(result.text, quote=True)}"'
            text = "" if result is None else escape(cell_text(result))
            cells += f'<td class="{kind}"{hint}>{text}</td>'
        yield f"<tr><td><code>{escape(name)}</code><br><small>{summary}</small></td>{cells}</tr>"
    yield "</table>"


def _failures(report: Report) -> Iterator[str]:
    failed = [result for result in report.results.values() if result.outcome == FAILED]
    if failed:
        yield "<h2>What was seen</h2>"
    for result in failed:
        yield f"<h3><code>{escape(result.id)}</code></h3><pre>{escape(result.text)}</pre>"
