"""The mutants of mutants.toml, and whether they still fit the sources."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name("mutants.toml")


class StaleMutantError(Exception):
    """A mutant no longer fits the sources."""


@dataclass(frozen=True)
class Mutant:
    """One small change that removes the fix of one pitfall.

    Attributes:
        name: Its name.
        pitfall: The pitfall's number.
        takes: What it removes, in a few words.
        file: The file it changes, relative to the root.
        old: Text that occurs in the file exactly once.
        new: The text that replaces it.
        caught_by: The tests that must all fail, every time.
    """

    name: str
    pitfall: int
    takes: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]

    @property
    def in_c(self) -> bool:
        return self.file.startswith("csrc/")

    def apply(self, root: Path) -> None:
        """Change the file under `root`."""
        path = root / self.file
        text = path.read_text()
        if (found := text.count(self.old)) != 1:
            raise StaleMutantError(
                f"{self.name}: its text occurs {found} times in {self.file}, not once: bring "
                f"{DATA.name} up to date with the source"
            )
        path.write_text(text.replace(self.old, self.new))


def mutants() -> list[Mutant]:
    """Return all of them, in the order of the pitfalls' numbers."""
    entries = tomllib.loads(DATA.read_text())["mutant"]
    every = [Mutant(**{**entry, "caught_by": tuple(entry["caught_by"])}) for entry in entries]
    return sorted(every, key=lambda mutant: mutant.pitfall)


def test_files() -> list[Path]:
    """Return the files that have tests of pitfalls, relative to the root."""
    noted = re.compile(r'@pitfall\(|id=f?"pitfall\.')
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in files if noted.search(path.read_text())]
