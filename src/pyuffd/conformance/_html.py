"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape

from pyuffd.conformance._report import FAILED, MEMORY, PASSED, SKIPPED, Report, Result, cell_text

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em;
  color: #222; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { padding: 2px 8px; border: 1px solid #ddd; text-align: left; vertical-align: top; }
thead th { position: sticky; top: 0; background: #fff; }
.verdict { font-size: 1.3em; padding: .5em .8em; border-radius: 4px; background: #d9f2d9; }
.verdict.failed { background: #f8c4c4; }
td.passed { background: #d9f2d9; } td.failed { background: #f8c4c4; font-weight: bold; }
td.skipped { background: #eee; color: #666; } td.none { border-color: #f4f4f4; }
table.wide { width: 100%; table-layout: fixed; } table.wide th { width: 8.5em; }
table.wide th:first-child { width: auto; } td { overflow-wrap: anywhere; }
code, pre { font: 12px/1.35 ui-monospace, monospace; }
pre { background: #f7f7f7; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; } td.failed a { color: #900; } :target { outline: 2px solid #b00; }
small { color: #666; } .broken { color: #b00020; font-weight: bold; }
#only:checked ~ details tr.plain { display: none; }
#only:checked ~ details.plain { display: none; }
summary { cursor: pointer; font-size: 1.15em; margin: .6em 0 .2em; }
"""
_NAMES = {PASSED: "passed", FAILED: "failed", SKIPPED: "skipped"}


def html(report: Report) -> str:
    """Return the page."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    title = f"userfaultfd conformance on Linux {report.kernel['release']}"
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    yield from _verdict(report)
    yield (
        f"<p>{escape(report.kernel['version'])}, {escape(report.kernel['machine'])};"
        f" pyuffd {escape(report.pyuffd_version)}. Feature mask"
        f" <code>{report.features:#x}</code>: {escape(', '.join(report.feature_names()))}</p>"
    )
    yield from _skips(report)
    yield from _messages(report)
    yield from _failures(report)
    yield from _groups(report)
    yield from _matrix(report)
    yield "</body></html>"


def _verdict(report: Report) -> Iterator[str]:
    counts = report.counts()
    parts = [f"{counts[outcome]} {name}" for outcome, name in _NAMES.items()]
    if report.fatal:
        parts.append("the kernel reported that it is broken")
    kind = "verdict failed" if counts[FAILED] or report.fatal else "verdict"
    yield f'<p class="{kind}">{", ".join(parts)}</p>'


def _messages(report: Report) -> Iterator[str]:
    yield "<h2>Kernel log</h2><ul>"
    if not report.log_readable:
        yield "<li>could not be read: a kernel WARN would have been missed</li>"
    elif not report.messages:
        yield "<li>no warning appeared</li>"
    for message in report.unexpected:
        kind = ' class="broken"' if message.is_fatal else ""
        text, when = escape(message.text), escape(message.when)
        yield f"<li{kind}><code>{text}</code> <small>{when}</small></li>"
    for what, count in report.expected_messages().items():
        yield f"<li><small>{count} about {escape(what)}, caused by tests on purpose</small></li>"
    yield "</ul>"


def _failures(report: Report) -> Iterator[str]:
    failed = [result for result in report.results.values() if result.outcome == FAILED]
    if failed:
        yield "<h2>What was seen</h2>"
    for result in failed:
        row = escape(f"row-{result.case}", quote=True)
        yield (
            f'<h3 id="{escape(result.id, quote=True)}"><a href="#{row}">'
            f"<code>{escape(result.id)}</code></a></h3>"
        )
        yield f"<p>{escape(result.summary)}</p><pre>{escape(result.text)}</pre>"


def _group(name: str) -> str:
    """Return the heading of a case: an ioctl, a selftest, a patch."""
    parts = name.split(".")
    deep = parts[0] == "wp-series" or (parts[0] == "kselftest" and len(parts) > 2)
    return ".".join(parts[: 2 if deep else 1])


def _ordered(groups: Iterable[str]) -> list[str]:
    """Return the groups in the order of the cases, but related ones together, patches sorted."""
    found = list(groups)
    first = {name.partition(".")[0]: at for at, name in reversed(list(enumerate(found)))}
    return sorted(
        found,
        key=lambda name: (first[name.partition(".")[0]], name if name.startswith("wp-") else ""),
    )


def _groups(report: Report) -> Iterator[str]:
    """Yield a short table, one row for each group of cases."""
    shown = _memory(report)
    counts: dict[str, dict[str, Counter[str]]] = {}
    failed: dict[tuple[str, str], str] = {}
    for result in report.results.values():
        group = _group(result.case)
        row = counts.setdefault(group, {})
        row.setdefault(result.memory, Counter())[result.outcome] += 1
        if result.outcome == FAILED:
            failed.setdefault((group, result.memory), f"row-{result.case}")
    yield "<h2>Overview</h2><p>Results by what is checked, and by memory type.</p>"
    yield f'<table class="wide">{_head("", shown)}<tbody>'
    for name in _ordered(counts):
        row = counts[name]
        cells = ""
        for memory in shown:
            seen = row.get(memory, Counter())
            kind = next((what for what in (FAILED, PASSED, SKIPPED) if seen[what]), "none")
            text = ", ".join(f"{seen[what]} {word}" for what, word in _NAMES.items() if seen[what])
            if target := failed.get((name, memory)):
                text = f'<a href="#{escape(target, quote=True)}">{text}</a>'
            cells += f'<td class="{kind}">{text}</td>'
        link = escape(f"group-{name}", quote=True)
        yield f'<tr><td><a href="#{link}"><code>{escape(name)}</code></a></td>{cells}</tr>'
    yield "</tbody></table>"


def _matrix(report: Report) -> Iterator[str]:
    shown = _memory(report)
    groups: dict[str, dict[str, dict[str, Result]]] = {}
    for name, row in report.matrix().items():
        groups.setdefault(_group(name), {})[name] = row
    yield "<h2>Behaviour by memory type</h2>"
    yield "<p>Brackets show which of several accepted behaviours the kernel has.</p>"
    yield '<input type="checkbox" id="only"><label for="only"> Only what did not pass</label>'
    for group in _ordered(groups):
        rows = groups[group]
        link = escape(f"group-{group}", quote=True)
        kind = "" if any(map(_stands_out, rows.values())) else ' class="plain"'
        yield f'<details id="{link}" open{kind}><summary><code>{escape(group)}</code></summary>'
        yield f'<table class="wide">{_head("case", shown)}<tbody>'
        yield from (_row(name, row, shown) for name, row in rows.items())
        yield "</tbody></table></details>"


def _row(name: str, row: dict[str, Result], shown: list[str]) -> str:
    cells = ""
    for memory in shown:
        result = row.get(memory)
        if result is None:
            cells += '<td class="none"></td>'
            continue
        text = escape(cell_text(result))
        if result.outcome == FAILED:
            text = f'<a href="#{escape(result.id, quote=True)}">{text}</a>'
        hint = f' title="{escape(result.text, quote=True)}"' if result.text else ""
        cells += f'<td class="{result.outcome}"{hint}>{text}</td>'
    kind = "" if _stands_out(row) else ' class="plain"'
    summary = escape(next(iter(row.values())).summary)
    link = escape(f"row-{name}", quote=True)
    first = f"<td><code>{escape(name)}</code><br><small>{summary}</small></td>"
    return f'<tr id="{link}"{kind}>{first}{cells}</tr>'


def _stands_out(row: dict[str, Result]) -> bool:
    return any(result.outcome != PASSED for result in row.values())


def _skips(report: Report) -> Iterator[str]:
    reasons = report.skip_reasons()
    if not reasons:
        return
    yield "<h2>Skipped, by reason</h2><ul>"
    for reason, count in reasons.most_common():
        yield f"<li>{count}: {escape(reason)}</li>"
    yield "</ul>"


def _memory(report: Report) -> list[str]:
    found = {result.memory for result in report.results.values()}
    return [name for name in MEMORY if name in found]


def _head(first: str, shown: list[str]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in shown)
    return f"<thead><tr><th>{first}</th>{heads}</tr></thead>"
