"""Kernels broken on purpose, one behaviour each, and which tests of the suite notice.

A patch in mutants/ is one broken kernel. Its text before the first `---` says what it breaks, and
`Caught-by:` the ids of which at least one has to fail.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyuffd.conformance import Report
from tests.vm import _debian, _image, _run

PATCHES = _image.ROOT / "tests/vm/mutants"
PAGE = _image.ROOT / "docs/mutants.md"
OUTPUT = _image.ROOT / "build/mutants"
FRAGMENT = PATCHES / "kernel.config"
SERIES = "6.12"
UNMODIFIED = "unmodified"

# The kernel is small, and several times faster under emulation than a distribution's. A mutant's
# test waits in vain for as long as it is allowed to.
SCALE = 4.0
RUN_S = 300.0
SELECTION = ("-k", "wp-series")

_BUILD_PROGRAMS = ("make", "gcc", "flex", "bison", "bc", "patch")


class BuildError(Exception):
    """A patch does not apply, or a kernel does not build."""


@dataclass(frozen=True)
class Mutant:
    """One patch.

    Attributes:
        name: The file's name.
        what: What it breaks, in a sentence.
        caught_by: A pattern of test ids; one of them has to fail.
        text: The patch.
    """

    name: str
    what: str
    caught_by: str
    text: str

    @property
    def files(self) -> list[str]:
        """The files it changes, relative to the kernel's tree."""
        return re.findall(r"^\+\+\+ b/(\S+)", self.text, re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What the suite said about one kernel."""

    name: str
    sentence: str
    failed: frozenset[str]
    passed: int
    release: str
    wall_s: float

    def catches(self, pattern: str) -> list[str]:
        """Return the failed ids that match."""
        return sorted(fnmatch.filter(self.failed, pattern))


def mutants() -> list[Mutant]:
    """Return all patches, in order."""
    return [_read(path) for path in sorted(PATCHES.glob("*.patch"))]


def _read(path: Path) -> Mutant:
    text = path.read_text()
    head = text.partition("\n---\n")[0]
    caught_by = re.search(r"^Caught-by: (\S+)$", head, re.MULTILINE)
    if caught_by is None:
        raise BuildError(f"{path.name} has no Caught-by line")
    return Mutant(path.stem, head.partition("\n\n")[0].replace("\n", " "), caught_by[1], text)


class Builder:
    """One source tree, in which kernels are built one after the other."""

    def __init__(self, tree: Path, jobs: int) -> None:
        lacking = [name for name in _BUILD_PROGRAMS if shutil.which(name) is None]
        if lacking:
            raise BuildError(f"building a kernel takes {' and '.join(lacking)}, not installed here")
        self._tree = tree
        self._jobs = jobs
        self._images = _debian.cache_dir() / "mutants"
        self._pristine = tree.with_name(f"{tree.name}.pristine")
        self._images.mkdir(parents=True, exist_ok=True)
        self._release = self._make("-s", "kernelversion").strip()

    def image(self, mutant: Mutant | None) -> Path:
        """Return the kernel with one patch, or with none, built unless the cache has it.

        Raises:
            BuildError: the patch does not apply, or the kernel does not build.
        """
        patch = mutant.text if mutant else ""
        name = mutant.name if mutant else UNMODIFIED
        key = hashlib.sha256((FRAGMENT.read_text() + patch).encode()).hexdigest()[:12]
        image = self._images / f"{name}-{self._release}-{key}.bzImage"
        if image.exists():
            return image
        self._configure()
        self._restore(mutants())
        try:
            if mutant:
                self._apply(mutant)
            self._make("bzImage")
        finally:
            self._restore(mutants())
        partial = image.with_suffix(".partial")
        shutil.copyfile(self._tree / "arch/x86/boot/bzImage", partial)
        partial.rename(image)
        return image

    def _configure(self) -> None:
        """Merge the fragment into tinyconfig, unless that is what the tree has."""
        done = self._tree / ".pyuffd-fragment"
        if done.exists() and done.read_bytes() == FRAGMENT.read_bytes():
            return
        self._make("-s", "tinyconfig")
        merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", str(FRAGMENT)]
        subprocess.run(merge, cwd=self._tree, check=True, stdout=subprocess.DEVNULL)
        self._make("-s", "olddefconfig")
        config = (self._tree / ".config").read_text()
        wanted = re.findall(r"^CONFIG_\w+=.*", FRAGMENT.read_text(), re.MULTILINE)
        if refused := [line for line in wanted if f"\n{line}\n" not in config]:
            raise BuildError(f"this kernel's configuration does not take {', '.join(refused)}")
        done.write_bytes(FRAGMENT.read_bytes())

    def _restore(self, patches: Iterable[Mutant]) -> None:
        """Bring back every file that a patch changes; the first time, keep a copy instead."""
        for name in sorted({name for mutant in patches for name in mutant.files}):
            kept, file = self._pristine / name, self._tree / name
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, kept)
            elif kept.read_bytes() != file.read_bytes():
                shutil.copyfile(kept, file)

    def _apply(self, mutant: Mutant) -> None:
        command = ["patch", "-p1", "--force", "--no-backup-if-mismatch", "--fuzz=0"]
        done = subprocess.run(
            command, input=mutant.text, cwd=self._tree, capture_output=True, text=True
        )
        if done.returncode:
            raise BuildError(f"{mutant.name}: the patch does not apply: {done.stdout.strip()}")

    def _make(self, *arguments: str) -> str:
        command = ["nice", "-n", "19", "make", f"-j{self._jobs}", *arguments]
        done = subprocess.run(command, cwd=self._tree, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"make {arguments[-1]} failed:\n{done.stderr.strip()[-2000:]}")
        return done.stdout


def try_out(name: str, image: Path) -> Outcome:
    """Run the suite's part about the series on one kernel."""
    guest = _run.Guest(image, OUTPUT / name, scale=SCALE, run_s=RUN_S)
    arguments, _ = _run.redirect([*_run.SUITE, *SELECTION])
    result = guest.pytest(*arguments)
    try:
        report = Report.read(result.folder / "report.json")
    except OSError:
        sentence = result.sentence or "there is no report"
        return Outcome(name, sentence, frozenset(), 0, "", result.wall_s)
    by_outcome: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for entry in report.results.values():
        by_outcome[entry.outcome].add(entry.id)
    broken = "; ".join(message.text for message in report.messages if message.is_fatal)
    return Outcome(
        name,
        f"the kernel said: {broken}" if broken else "",
        frozenset(by_outcome["failed"]),
        len(by_outcome["passed"]),
        report.kernel["release"],
        result.wall_s,
    )


def verdicts(patches: Sequence[Mutant], outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence for each thing that is not as it has to be; the first is unmodified."""
    unmodified, *others = outcomes
    wrong = []
    if unmodified.sentence or unmodified.failed or not unmodified.passed:
        failed = ", ".join(sorted(unmodified.failed)) or unmodified.sentence or "nothing ran"
        wrong.append(f"the unmodified kernel does not pass: {failed}")
    for mutant, outcome in zip(patches, others, strict=True):
        if not outcome.catches(mutant.caught_by):
            reason = outcome.sentence or f"{len(outcome.failed)} other tests failed"
            wrong.append(f"{mutant.name} is caught by no {mutant.caught_by} ({reason})")
    return wrong


def page(patches: Sequence[Mutant], outcomes: Sequence[Outcome]) -> str:
    """Return docs/mutants.md."""
    return "\n".join(_lines(patches, outcomes)) + "\n"


def _lines(patches: Sequence[Mutant], outcomes: Sequence[Outcome]) -> Iterator[str]:
    unmodified, *others = outcomes
    yield "# Kernels broken on purpose"
    yield ""
    yield (
        f"Written by `make mutants`; do not edit. Each row is Linux {unmodified.release} with one "
        "patch of `tests/vm/mutants`, which breaks one thing that the series *userfaultfd-wp: "
        "Support shmem and hugetlbfs* gave. A mutant is caught if a test fails whose id names the "
        "patch of the series (the number in the mutant's name)."
    )
    yield ""
    yield (
        f"Unmodified: {unmodified.passed} tests of `{' '.join(SELECTION)}` pass, "
        f"{len(unmodified.failed)} fail, {unmodified.wall_s:.0f} s."
    )
    yield ""
    yield "| | mutant | what it breaks | caught by | other tests that fail |"
    yield "|---|---|---|---|---|"
    for number, (mutant, outcome) in enumerate(zip(patches, others, strict=True), 1):
        named = outcome.catches(mutant.caught_by)
        caught = ", ".join(f"`{name}`" for name in named) or f"**nothing** {outcome.sentence}"
        rest = len(outcome.failed) - len(named)
        yield f"| {number} | `{mutant.name}` | {mutant.what} | {caught.strip()} | {rest or '-'} |"
    yield ""
    yield "## Every test that fails, by mutant"
    yield ""
    numbers = range(1, len(patches) + 1)
    yield "| test | " + " | ".join(map(str, numbers)) + " |"
    yield "|---|" + "---|" * len(patches)
    for test in sorted(frozenset().union(*(outcome.failed for outcome in others))):
        cells = ("x" if test in outcome.failed else "" for outcome in others)
        yield f"| `{test}` | " + " | ".join(cells) + " |"


def main() -> int:
    """Build, run, write the page; 0 if every mutant is caught and the unmodified kernel passes."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="make -j")
    parser.add_argument("--parallel", type=int, default=1, help="guests at a time")
    parser.add_argument("--build-only", action="store_true", help="do not run them")
    parser.add_argument(
        "names", nargs="*", help="some mutants only; docs/mutants.md stays as it is"
    )
    options = parser.parse_args()
    _run.end_with_us()
    try:
        every = mutants()
        if unknown := set(options.names) - {mutant.name for mutant in every}:
            raise BuildError(f"there is no mutant {', '.join(sorted(unknown))}")
        patches = [m for m in every if m.name in options.names or not options.names]
        builder = Builder(_debian.source(SERIES), options.jobs)
        images = {}
        for mutant in [None, *patches]:
            name = mutant.name if mutant else UNMODIFIED
            images[name] = builder.image(mutant)
            print(f"mutants: built {name}", flush=True)
        if options.build_only:
            return 0
        outcomes = []
        with ThreadPoolExecutor(options.parallel) as pool:
            for outcome in pool.map(try_out, images, images.values()):
                outcomes.append(outcome)
                print(
                    f"mutants: {outcome.name}: {outcome.passed} passed, {len(outcome.failed)} "
                    f"failed, {outcome.wall_s:.0f} s {outcome.sentence}",
                    flush=True,
                )
    except (BuildError, _debian.KernelNotFoundError, _image.MissingOnHostError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if not options.names:
        PAGE.write_text(page(patches, outcomes))
    wrong = verdicts(patches, outcomes)
    for sentence in wrong:
        print(f"mutants: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
