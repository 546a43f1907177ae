"""Kernels broken on purpose, one behaviour each, and which tests of the suite notice.

A patch in mutants/ is one broken kernel. Its text before the first `---` says what it breaks. The
line `Caught-by:` is a pattern of ids; at least one of them must fail, or any test without the line.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyuffd.conformance import Report
from tests.vm import _debian, _image, _run, _tree

PATCHES = _image.ROOT / "tests/vm/mutants"
PAGE = _image.ROOT / "docs/generated/mutants.md"
OUTPUT = _image.ROOT / "build/mutants"
FRAGMENT = PATCHES / "kernel.config"
UNMODIFIED = "unmodified"
ANY_TEST = "*"

# The kernel is small, and several times faster under emulation than a distribution's. A mutant may
# make a test wait in vain until its limit.
SCALE = 4.0
RUN_S = 300.0
SELECTION = ("-k", "wp-series or wp-async or pagemap-scan")
PROGRESS_S = 20.0

_BUILD_PROGRAMS = ("make", "gcc", "flex", "bison", "bc", "patch")


class BuildError(Exception):
    """A patch does not apply, or a kernel does not build."""


@dataclass(frozen=True)
class Mutant:
    """One patch.

    Attributes:
        name: The file's name.
        what: What it breaks, in a sentence.
        caught_by: A pattern of test ids; one of them must fail.
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
    """The result of the suite on one kernel."""

    name: str
    sentence: str
    failed: frozenset[str]
    passed: int
    release: str
    wall_s: float

    def catches(self, pattern: str) -> list[str]:
        """Return the failed ids that match a pattern."""
        return sorted(fnmatch.filter(self.failed, pattern))


def mutants(folder: Path = PATCHES) -> list[Mutant]:
    """Return all patches of a folder, in order.

    Raises:
        BuildError: there are none.
    """
    found = [_read(path) for path in sorted(folder.glob("*.patch"))]
    if not found:
        raise BuildError(f"{folder} has no *.patch")
    return found


def _read(path: Path) -> Mutant:
    text = path.read_text()
    head = text.partition("\n---\n")[0]
    caught_by = re.search(r"^Caught-by: (\S+)$", head, re.MULTILINE)
    what = head.partition("\n\n")[0].replace("\n", " ")
    return Mutant(path.stem, what, caught_by[1] if caught_by else ANY_TEST, text)


class Builder:
    """A source tree in which kernels are built one after the other."""

    def __init__(
        self,
        tree: Path,
        jobs: int,
        patches: Sequence[Mutant] = (),
        pristine: Path | None = None,
    ) -> None:
        lacking = [name for name in _BUILD_PROGRAMS if shutil.which(name) is None]
        if lacking:
            raise BuildError(f"building a kernel needs {' and '.join(lacking)}, not installed here")
        self._tree = tree
        self._jobs = jobs
        self._patches = patches
        self._images = _debian.cache_dir() / "mutants"
        self._pristine = pristine or tree
        self._images.mkdir(parents=True, exist_ok=True)
        self.release = self.make("-s", "kernelversion").strip()

    def image(self, mutant: Mutant | None) -> Path:
        """Return the kernel with one patch, or with none, built unless the cache has it.

        The user's tree may have changed, so its kernels are always built.

        Raises:
            BuildError: the patch does not apply, or the kernel does not build.
        """
        patch = mutant.text if mutant else ""
        name = mutant.name if mutant else UNMODIFIED
        key = hashlib.sha256((FRAGMENT.read_text() + patch).encode()).hexdigest()[:12]
        image = self._images / f"{name}-{self.release}-{key}.bzImage"
        if image.exists() and not _tree.own():
            return image
        self.configure()
        # An interrupted run may have left patched files.
        self._restore()
        try:
            if mutant:
                self._apply(mutant)
            self.make("bzImage")
        finally:
            self._restore()
        partial = image.with_suffix(".partial")
        shutil.copyfile(self._tree / "arch/x86/boot/bzImage", partial)
        partial.rename(image)
        return image

    def configure(self, more: str = "") -> None:
        """Merge the fragment and more lines into tinyconfig, unless the tree has them already."""
        done, wanted = self._tree / ".pyuffd-fragment", FRAGMENT.read_text() + more
        if done.exists() and done.read_text() == wanted:
            return
        fragment = self._tree / ".pyuffd-wanted"
        fragment.write_text(wanted)
        self.make("-s", "tinyconfig")
        merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", fragment.name]
        subprocess.run(merge, cwd=self._tree, check=True, stdout=subprocess.DEVNULL)
        self.make("-s", "olddefconfig")
        config = (self._tree / ".config").read_text()
        lines = re.findall(r"^CONFIG_\w+=.*", wanted, re.MULTILINE)
        if refused := [line for line in lines if f"\n{line}\n" not in config]:
            raise BuildError(f"this kernel's configuration refuses {', '.join(refused)}")
        done.write_text(wanted)

    def _restore(self) -> None:
        """Restore every file that a patch changes."""
        every = [*mutants(), *self._patches]
        for name in sorted({name for mutant in every for name in mutant.files}):
            original, file = self._pristine / name, self._tree / name
            if original.exists() and original.read_bytes() != file.read_bytes():
                shutil.copyfile(original, file)

    def _apply(self, mutant: Mutant) -> None:
        command = ["patch", "-p1", "--force", "--no-backup-if-mismatch", "--fuzz=0"]
        done = subprocess.run(
            command, input=mutant.text, cwd=self._tree, capture_output=True, text=True
        )
        if done.returncode:
            raise BuildError(f"{mutant.name}: the patch does not apply: {done.stdout.strip()}")

    def make(self, *arguments: str) -> str:
        """Run make at the lowest priority; print its progress now and then."""
        command = ["nice", "-n", "19", "make", f"-j{self._jobs}", *arguments]
        output: list[str] = []
        compiled, said_at = 0, time.monotonic()
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, cwd=self._tree, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                compiled += line.startswith("  CC ")
                if time.monotonic() - said_at > PROGRESS_S:
                    said_at = time.monotonic()
                    print(f"  {compiled} files compiled, now {line.split()[-1]}", flush=True)
            if process.wait():
                errors.seek(0)
                text = errors.read().strip()[-2000:]
                raise BuildError(f"make {arguments[-1]} failed:\n{text}")
        return "".join(output)


def try_out(name: str, image: Path, select: str = SELECTION[1], cpus: int = 1) -> Outcome:
    """Run the tests of the patch series, or another selection, on one kernel."""
    guest = _run.Guest(
        image, OUTPUT / name, scale=SCALE, run_s=RUN_S, accel=_run.accel(cpus), cpus=cpus
    )
    arguments, _ = _run.redirect([*_run.SUITE, *(("-k", select) if select else ())])
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
    """Return a sentence for each wrong outcome; the first one is of the unmodified kernel."""
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
    """Return docs/generated/mutants.md."""
    return "\n".join(_lines(patches, outcomes)) + "\n"


def _lines(patches: Sequence[Mutant], outcomes: Sequence[Outcome]) -> Iterator[str]:
    unmodified, *others = outcomes
    yield "# Kernels broken on purpose"
    yield ""
    yield (
        "Would the suite notice if a kernel lost what the write-protect series and trackers of "
        "writes rely on? Each row breaks one thing, and names the tests that fail. [Tests on "
        "another kernel](../kernels.md#kernels-broken-on-purpose) tells how to repeat it."
    )
    yield ""
    yield (
        f"Written by `make mutants`; do not edit. Each row is Linux {unmodified.release} with one "
        "patch of `tests/vm/mutants`, which breaks one thing: those with a number, what that patch "
        "of the series *userfaultfd-wp: Support shmem and hugetlbfs* gave; the others, what "
        "trackers of writes depend on. A mutant is caught if a test fails that its patch names."
    )
    yield ""
    yield (
        f"Unmodified: {unmodified.passed} tests of `{shlex.join(SELECTION)}` pass, "
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
    """Build, run, write the page; 0 if all mutants are caught and the unmodified kernel passes."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="make -j")
    parser.add_argument("--parallel", type=int, default=1, help="guests at a time")
    parser.add_argument("--build-only", action="store_true", help="do not run them")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder of *.patch files")
    parser.add_argument(
        "--select", default=SELECTION[1], help='cases, as for pytest -k; "" for all of them'
    )
    parser.add_argument("--unmodified", action="store_true", help="only the kernel without a patch")
    parser.add_argument("--cpus", type=int, default=1, help="number of CPUs of a guest")
    parser.add_argument(
        "names", nargs="*", help="only these mutants; docs/generated/mutants.md does not change"
    )
    options = parser.parse_args()
    is_usual = not options.names and not options.unmodified and options.cpus == 1
    is_usual &= (options.patches, options.select) == (PATCHES, SELECTION[1])
    _run.end_with_us()
    try:
        every = [] if options.unmodified else mutants(options.patches)
        if unknown := set(options.names) - {mutant.name for mutant in every}:
            raise BuildError(f"there is no mutant {', '.join(sorted(unknown))}")
        patches = [m for m in every if m.name in options.names or not options.names]
        pristine = _tree.pristine()
        builder = Builder(_tree.copy(pristine, "patched"), options.jobs, patches, pristine)
        images = {}
        for number, mutant in enumerate([None, *patches]):
            name = mutant.name if mutant else UNMODIFIED
            print(f"mutants: building {name}, {number} of {len(patches)} patches", flush=True)
            images[name] = builder.image(mutant)
        if options.build_only:
            return 0
        outcomes = []
        run = functools.partial(try_out, select=options.select, cpus=options.cpus)
        with ThreadPoolExecutor(options.parallel) as pool:
            for outcome in pool.map(run, images, images.values()):
                outcomes.append(outcome)
                print(
                    f"mutants: {outcome.name}: {outcome.passed} passed, {len(outcome.failed)} "
                    f"failed, {outcome.wall_s:.0f} s {outcome.sentence}",
                    flush=True,
                )
    except (BuildError, _debian.KernelNotFoundError, _image.MissingOnHostError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if is_usual:
        PAGE.write_text(page(patches, outcomes))
    wrong = verdicts(patches, outcomes)
    for sentence in wrong:
        print(f"mutants: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
