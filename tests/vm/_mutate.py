"""Break C functions by machine: one text contains all mutants of a file, and one at a time is on.

A mutant is a place in a function and a change to what it does. One kernel contains all mutants:
`if (cond)` becomes `if (pyuffd_is(7) ? !(cond) : !!(cond))`, and a variable of the kernel selects
the number that is on. pyuffd_is() records that its place was reached, so the same kernel also shows
which tests reach which mutants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HEADER = """\
/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _LINUX_PYUFFD_MUTANT_H
#define _LINUX_PYUFFD_MUTANT_H
#include <linux/compiler.h>
#include <linux/types.h>

/* The mutant that is on; the round of tests; the last round in which each place was reached. */
extern u32 pyuffd_mutant, pyuffd_round;
extern u32 pyuffd_reached[];

static __always_inline bool pyuffd_is(u32 number)
{
	WRITE_ONCE(pyuffd_reached[number], READ_ONCE(pyuffd_round));
	return unlikely(READ_ONCE(pyuffd_mutant) == number);
}
#endif
"""
# Appended to one of the files. The three are in /sys/kernel/debug/pyuffd.
DEFINITIONS = """
#include <linux/debugfs.h>

u32 pyuffd_mutant, pyuffd_round;
u32 pyuffd_reached[PYUFFD_MUTANTS];
static struct debugfs_blob_wrapper pyuffd_blob = {
	.data = pyuffd_reached,
	.size = sizeof(pyuffd_reached),
};

static int __init pyuffd_debugfs(void)
{
	struct dentry *folder = debugfs_create_dir("pyuffd", NULL);

	debugfs_create_u32("mutant", 0600, folder, &pyuffd_mutant);
	debugfs_create_u32("round", 0600, folder, &pyuffd_round);
	debugfs_create_blob("reached", 0400, folder, &pyuffd_blob);
	return 0;
}
late_initcall(pyuffd_debugfs);
"""
INCLUDE = "#include <linux/pyuffd_mutant.h>\n"

# Calls that must not be left out: without them their counterpart hangs or crashes, which proves
# nothing.
_PAIRED = re.compile(
    r"lock|BUG|WARN|might_|cond_resched|trace_|put|get_|mmget|pr_|kmap|kunmap|unmap|schedule|init"
    r"|up_|down_|seqcount|begin|end|arch_|set_current_state|add_wait|remove_wait|fput|kmem|free"
    r"|spin|defined|sizeof|typeof"
)
# The text that may precede a call that is a whole statement, and not the end of one.
_ENDS_STATEMENT = re.compile(
    r"(\A|[;{})]|\b(else|do)|\*/|^\s*(case .*|default|\w+):)\s*\Z", re.MULTILINE
)
_NOT_A_CONDITION = re.compile(r"IS_ENABLED|CONFIG_|__builtin|BUG_ON|WARN|uffd_supports|is_module")
_FUNCTION = re.compile(r"^(?:[a-z_].*\n)(?:[ \t].*\n)*?\{\n(?P<body>(?:.*\n)*?)\}\n", re.MULTILINE)
_NAME = re.compile(r"([a-z_][a-z0-9_]*)\s*\($|([a-z_][a-z0-9_]*)\(")
_RETURNS_NUMBER = re.compile(r"^(static |inline |__always_inline |noinline )*(int|long|ssize_t)\b")
_RETURNS_TRUTH = re.compile(r"^(static |inline |__always_inline |noinline )*bool\b")


@dataclass(frozen=True)
class Mutant:
    """One way to break one place.

    Attributes:
        number: The number that switches it on; 0 is none.
        file: Its file, relative to the kernel's tree.
        function: Its function.
        line: Its line in the original file.
        kind: negate, never, drop-left, drop-right, bound, succeed, fail, skip, keep.
        was: The original text, on one line.
        becomes: What it does instead, for people.
    """

    number: int
    file: str
    function: str
    line: int
    kind: str
    was: str
    becomes: str

    @property
    def name(self) -> str:
        """A name that tells people where it is."""
        return f"{self.file}:{self.line}:{self.kind}"


@dataclass(frozen=True)
class _Alternative:
    kind: str
    code: str
    becomes: str


@dataclass(frozen=True)
class _Place:
    """A piece of text, its alternatives, and how the choice is written."""

    start: int
    end: int
    alternatives: tuple[_Alternative, ...]
    write: Callable[[str, list[int]], str]


def functions(text: str) -> Iterator[tuple[str, str, int, str]]:
    """Yield name, signature, offset of the body and body of each function of a file."""
    for match in _FUNCTION.finditer(text):
        signature = text[match.start() : match.start("body")]
        name = _NAME.search(signature)
        if name and not signature.startswith(("struct", "enum", "union", "typedef", "#")):
            yield name[1] or name[2], signature, match.start("body"), match["body"]


def mutate(
    file: str, text: str, wanted: Callable[[str, str], bool], first: int
) -> tuple[str, list[Mutant]]:
    """Return a file with all its mutants in it, and what they are.

    Args:
        file: Its name in the tree.
        text: Its content.
        wanted: Whether a place is of interest, by function and text.
        first: The number of the first mutant.
    """
    mutants: list[Mutant] = []
    pieces, done = [], 0
    for name, signature, offset, body in functions(text):
        for place in _places(signature, body):
            was = body[place.start : place.end]
            if not wanted(name, was):
                continue
            line = text.count("\n", 0, offset + place.start) + 1
            numbers = []
            for alternative in place.alternatives:
                numbers.append(first + len(mutants))
                shown = " ".join(was.split())
                mutants.append(
                    Mutant(
                        numbers[-1],
                        file,
                        name,
                        line,
                        alternative.kind,
                        shown,
                        " ".join(alternative.becomes.split()),
                    )
                )
            pieces.append(text[done : offset + place.start])
            pieces.append(place.write(was, numbers))
            done = offset + place.end
    pieces.append(text[done:])
    changed = "".join(pieces)
    if mutants:
        at = changed.index("#include")
        changed = changed[:at] + INCLUDE + changed[at:]
    return changed, mutants


def _places(signature: str, body: str) -> list[_Place]:
    found = [*_conditions(body), *_calls(body), *_returns(signature, body), *_changes(body)]
    found.sort(key=lambda place: place.start)
    # Drop places inside another one.
    kept: list[_Place] = []
    for place in found:
        if not kept or place.start >= kept[-1].end:
            kept.append(place)
    return kept


def _closing(text: str, opening: int) -> int:
    """Return the offset after the parenthesis that closes the one at `opening`, or -1."""
    depth = 0
    for at in range(opening, len(text)):
        if text[at] in "()":
            depth += 1 if text[at] == "(" else -1
            if not depth:
                return at + 1
    return -1


def _conditions(body: str) -> Iterator[_Place]:
    for match in re.finditer(r"^[ \t]*(?:\} else )?(?:else )?(if|while) \(", body, re.MULTILINE):
        start = match.end()
        end = _closing(body, start - 1) - 1
        condition = body[start:end]
        if end < 0 or "/*" in condition or _NOT_A_CONDITION.search(condition):
            continue
        alternatives = []
        if match[1] == "if":
            alternatives.append(_Alternative("negate", f"!({condition})", f"!({condition})"))
            alternatives.append(_Alternative("never", "0", "false"))
            for operator in ("&&", "||"):
                parts = _split(condition, operator)
                if len(parts) >= 2:
                    glue = f" {operator} "
                    left, right = glue.join(parts[1:]), glue.join(parts[:-1])
                    alternatives.append(_Alternative("drop-left", left, left))
                    alternatives.append(_Alternative("drop-right", right, right))
                    break
        for old, new in ((" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > ")):
            if condition.count(old) == 1 and "<<" not in condition and ">>" not in condition:
                other = condition.replace(old, new)
                alternatives.append(_Alternative("bound", other, other))
        if alternatives:
            yield _Place(start, end, tuple(alternatives), _chooser(alternatives, "!!({was})"))


def _split(condition: str, operator: str) -> list[str]:
    """Split at an operator outside of parentheses; not if the other operator occurs there too."""
    parts, depth, last = [], 0, 0
    other = "||" if operator == "&&" else "&&"
    for at, letter in enumerate(condition):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth and condition.startswith(operator, at):
            parts.append(condition[last:at].strip())
            last = at + len(operator)
        elif not depth and condition.startswith(other, at):
            return []
    return [*parts, condition[last:].strip()]


def _chooser(alternatives: list[_Alternative], otherwise: str) -> Callable[[str, list[int]], str]:
    def write(was: str, numbers: list[int]) -> str:
        choices = "".join(
            f"pyuffd_is({number}) ? ({one.code}) : "
            for number, one in zip(numbers, alternatives, strict=True)
        )
        return choices + otherwise.format(was=was)

    return write


def _calls(body: str) -> Iterator[_Place]:
    for match in re.finditer(r"^[ \t]+([a-z_][a-z0-9_]*)\(", body, re.MULTILINE):
        end = _closing(body, match.end() - 1)
        start = match.start(1)
        if end < 0 or body[end : end + 2] != ";\n" or _PAIRED.search(match[1]):
            continue
        if start > 0 and not _ENDS_STATEMENT.search(body, 0, match.start()):
            continue

        def write(was: str, numbers: list[int]) -> str:
            return f"do {{ if (!pyuffd_is({numbers[0]})) {was} }} while (0);"

        yield _Place(start, end + 1, (_Alternative("skip", "", "nothing"),), write)


def _returns(signature: str, body: str) -> Iterator[_Place]:
    is_number = _RETURNS_NUMBER.match(signature) is not None
    patterns = [(r"(?:ret|err|error|res) = (-E[A-Z]+)(?=;)", "0", "succeed")]
    if is_number:
        patterns.append((r"return (-E[A-Z]+)(?=;)", "0", "succeed"))
        patterns.append((r"return (0)(?=;)", "-EINVAL", "fail"))
    if _RETURNS_TRUTH.match(signature):
        patterns.append((r"return (true)(?=;)", "false", "fail"))
        patterns.append((r"return (false)(?=;)", "true", "succeed"))
    for pattern, other, kind in patterns:
        for match in re.finditer(rf"^[ \t]+{pattern}", body, re.MULTILINE):
            alternatives = [_Alternative(kind, other, other)]
            write = _chooser(alternatives, "{was}")
            yield _Place(match.start(1), match.end(1), tuple(alternatives), write)


def _changes(body: str) -> Iterator[_Place]:
    """Yield places that set or clear bits, or change an entry with a helper."""
    for match in re.finditer(r"^[ \t]+(\S+) \|= ([^;\n]+);", body, re.MULTILINE):
        alternatives = [_Alternative("keep", "0", f"{match[1]} as it was")]
        write = _chooser(alternatives, "({was})")
        yield _Place(match.start(2), match.end(2), tuple(alternatives), write)
    helpers = r"^[ \t]+(_?\w*(?:pte|pmd|entry)\w*) = (\w+\(\1\));"
    for match in re.finditer(helpers, body, re.MULTILINE):
        alternatives = [_Alternative("keep", match[1], f"{match[1]} as it was")]
        write = _chooser(alternatives, "{was}")
        yield _Place(match.start(2), match.end(2), tuple(alternatives), write)
