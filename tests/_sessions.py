"""The console sessions of README.md and docs/: commands, and some of the lines they print.

    python -m tests._sessions docs/core.md

prints what the commands of a page print here, to be copied into it.

A session is the blocks in ```console of a page, in their order: commands after `$ `, which continue
in the next line after a backslash and after `<<'EOF'`, and lines that they print. One shell runs
them in one folder.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import _readme

BLOCK = re.compile(
    r"(?:^<!-- run: (?P<how>[^\n]*) -->\n)?^```console\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"^@@ (\d+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command, and the lines that the page shows below it."""

    command: str
    output: list[str]


@dataclass
class Session:
    """The console blocks of a page.

    Attributes:
        steps: Its commands.
        needs: What they must have: names of capabilities and features, or of programs.
    """

    steps: list[Step] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)


def session(page: Path) -> Session:
    """Return the session of a page; it has no steps if the page has no console."""
    found = Session()
    for block in BLOCK.finditer(page.read_text()):
        how = dict(word.split("=") for word in (block["how"] or "").split())
        found.needs += [name for name in how.get("needs", "").split(",") if name]
        found.steps += steps(block["text"])
    return found


def steps(text: str) -> Iterator[Step]:
    """Yield the commands of a block, each with the lines below it."""
    lines = iter(text.splitlines())
    step: Step | None = None
    for line in lines:
        if not line.startswith("$ "):
            assert step is not None, f"output of no command: {line}"
            step.output.append(line)
            continue
        if step is not None:
            yield step
        command = line[2:]
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if "<<'EOF'" in command:
            while not command.endswith("\nEOF"):
                command += "\n" + next(lines)
        step = Step(command, [])
    if step is not None:
        yield step


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit status."""

    status: int
    text: str


def run(steps: list[Step], folder: Path, limit_s: float) -> list[Done]:
    """Run the commands in a new folder; end what they left in the background.

    Raises:
        TimeoutError: the commands did not end in time; the text tells what was printed.
    """
    folder.mkdir()
    script, output = folder.with_suffix(".sh"), folder.with_suffix(".txt")
    script.write_text("".join(f"{step.command}\nprintf '\\n@@ %d\\n' $?\n" for step in steps))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "COLUMNS": "100",
    }
    with output.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc", str(script)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            shell.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(output.read_text(errors="replace")) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    texts = MARK.split(output.read_text(errors="replace"))
    pairs = zip(texts[::2], texts[1::2], strict=False)
    return [Done(int(status), text[:-1]) for text, status in pairs]


def transcript(page: Path) -> Iterator[str]:
    """Run the commands of a page; yield them with what they print."""
    steps = session(page).steps
    with TemporaryDirectory(prefix="page-") as folder:
        for step, done in zip(steps, run(steps, Path(folder, "here"), 300), strict=False):
            yield f"$ {step.command}\n{done.text}" + f"(status {done.status})\n" * bool(done.status)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for text in transcript(_readme.ROOT / name):
            print(text, end="")
