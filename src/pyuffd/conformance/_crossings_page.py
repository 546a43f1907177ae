"""The part of docs/generated/conformance.md about crossings: results and impossible ones."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from pyuffd.conformance import _crossing_parts as parts
from pyuffd.conformance import _page_states as states
from pyuffd.conformance._page_model import Answer, Entry, Page
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType


def page(slow: int) -> Iterator[str]:
    """Yield the section."""
    yield "## Crossings"
    yield ""
    yield (
        "Every operation on a page in every state, and every state after every event. The ids are"
        "\n`OPERATION.on.STATE.MEMORY`, `fault.read.STATE.MEMORY`,"
        " `fault.write.STATE.MEMORY` and `EVENT.STATE.MEMORY`. Each case checks\nerrno and"
        " result, then the page table, reads, checks it again, and writes: message, content and"
        " protection must be\nwhat the rules of `pyuffd.conformance._page_model` say."
        " `OPERATION.on` cases repeat this while the page is mapped read-only:\na write then fails"
        " with SIGSEGV and sends no message, and the page is as before once it is writable again."
        "\nMOVE needs both sides writable, or fails with EINVAL. The tables"
        " are made from these rules.\n"
        f"`OPERATION.after.everything.MEMORY` ({slow} cases, run with `--slow`) does every"
        " operation on every state after every event.\n"
        "`access.CALL.minor`, `-refused` and `poisoned` are crossings too: each system call of"
        " `access.CALL.missing` on a page\nthat only the file has, on one whose fault the"
        " descriptor refuses to handle, and on a poisoned page.\n"
        "`make test` runs a fixed quarter of the crossings, `PYUFFD_CROSSINGS=all make test` all of"
        " them.\n"
    )
    yield "Results of operations; a cell without memory types holds for all that have the state."
    yield ""
    yield "| state of the page | " + " | ".join(f"`{op.name}`" for op in parts.OPS) + " |"
    yield "|---|" + "---|" * len(parts.OPS)
    for state in states.STATES:
        cells = [_cell(state, _answer(op)) for op in parts.OPS]
        yield f"| `{state.name}`: a page {state.text} | " + " | ".join(cells) + " |"
    yield ""
    yield "The state of a page after an event."
    yield ""
    yield "| state of the page | " + " | ".join(f"`{each.name}`" for each in parts.BETWEENS) + " |"
    yield "|---|" + "---|" * len(parts.BETWEENS)
    for state in states.STATES:
        cells = [_cell(state, _after(between, state)) for between in parts.BETWEENS]
        yield f"| `{state.name}` | " + " | ".join(cells) + " |"
    yield ""
    yield "Combinations that are meaningless or impossible, and why."
    yield ""
    yield "| what | where | why |"
    yield "|---|---|---|"
    for state in states.STATES:
        if lacking := [name for name in MEMORY_TYPES if name not in state.memory]:
            why = states.ELSEWHERE[state.memory]
            yield f"| a page {state.text} | {', '.join(lacking)} | {why} |"
    for between in parts.BETWEENS:
        if lacking := [name for name in MEMORY_TYPES if name not in between.memory]:
            why = between.elsewhere or states.ELSEWHERE[between.memory]
            yield f"| `{between.name}` | {', '.join(lacking)} | {why} |"
    for between in parts.BETWEENS:
        for state in states.STATES:
            both = [name for name in state.memory if name in between.memory]
            reasons = {parts.why_not(between, state, name) for name in both} - {""}
            for why in sorted(reasons):
                yield f"| `{between.name}` of a page {state.text} | everywhere | {why} |"
    for between in parts.BETWEENS:
        lacking = [op.name for op in parts.OPS if not parts.can_meet(op, between)]
        if len(lacking) == len(parts.OPS):
            yield f"| an operation after `{between.name}` | everywhere | nothing is registered |"
        else:
            for name in lacking:
                yield f"| `{name}` after `{between.name}` | everywhere | it is another process |"
    yield (
        "| collapse and split | everywhere | they affect all pages of a huge page at once:"
        " `thp.collapse.*`, `PAGEMAP_SCAN.ok.protects-huge-in-part`, `UFFDIO_MOVE.*-huge*` |"
    )
    yield (
        "| a source that is cold | everywhere | only COPY reads a source:"
        " `UFFDIO_COPY.ok.cold-*`, on a hole |"
    )
    yield (
        "| a page that was migrated | everywhere | user space cannot migrate a single page;"
        " `wp-series.05.migration` and compaction migrate many |"
    )
    yield ""


def _answer(op: parts.Op) -> Callable[[Page, MemoryType], str]:
    def text(page: Page, memory: MemoryType) -> str:
        answer: Answer = op.rule(page, memory)
        return errno.errorcode[answer[0]] if answer[0] else "ok"

    return text


def _after(between: parts.Between, state: states.State) -> Callable[[Page, MemoryType], str]:
    def text(page: Page, memory: MemoryType) -> str:
        if parts.why_not(between, state, memory.name):
            return "-"
        after = between.rule(page, memory)
        words = [str(after.entry.value)]
        if after.wp and after.entry is not Entry.MARKER:
            words.append("protected")
        return " ".join(words)

    return text


def _cell(state: states.State, text: Callable[[Page, MemoryType], str]) -> str:
    by_text: dict[str, list[str]] = {}
    for name in state.memory:
        memory = MEMORY_TYPES[name]
        by_text.setdefault(text(state.page(memory), memory), []).append(name)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in by_text.items())
