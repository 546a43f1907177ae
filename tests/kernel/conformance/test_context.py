"""The context of cases: guarded accesses, children, messages, and an end that frees all threads."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyuffd import Feature, Pagefault, RegisterMode, Remove, WriteprotectMode, _memory
from pyuffd._memory import Interrupted
from pyuffd.conformance import Case, Context, Variant
from pyuffd.conformance._context import Mismatch
from pyuffd.testing import needs
from tests._child import run_child

SYS_GETPID = 39
SHORT_S = 0.3
VARIANTS = (Variant("now", "MOVE", features=Feature.MOVE), Variant("never", "", lacks=Feature.MOVE))


@pytest.fixture
def ctx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    """A context on anonymous memory whose waits are short."""
    for module in ("_context", "_beside"):
        monkeypatch.setattr(f"pyuffd.conformance.{module}.WAIT_S", SHORT_S)
    case = Case(
        name="t.x",
        summary="x",
        memory=("anon",),
        origin="x",
        features=Feature(0),
        needs=(),
        variants=VARIANTS,
        budget_s=10,
        is_slow=False,
        is_alone=False,
        run=lambda _: None,
    )
    with contextlib.closing(Context(case, "anon")) as context:
        yield context


def missing(ctx: Context, pages: int = 1) -> int:
    """Make and register a region; return its address."""
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.MISSING)
    return region.start


def test_access_that_meets_a_signal_says_which(ctx: Context) -> None:
    region = ctx.make(2)
    _memory.munmap(region.start + ctx.page, ctx.page)
    seen = ctx.read(region.start + ctx.page - 1, 2)
    assert seen == Interrupted(signal.SIGSEGV, 1, region.start + ctx.page)
    assert ctx.write(region.start, b"ok") is None
    assert ctx.read(region.start, 2) == b"ok"


@needs(Feature.POISON)
def test_access_to_poison_is_sigbus(ctx: Context) -> None:
    start = missing(ctx)
    ctx.uffd.poison(start, ctx.page)
    seen = ctx.read(start)
    # si_code is BUS_MCEERR_AR only if the kernel has CONFIG_MEMORY_FAILURE.
    assert isinstance(seen, Interrupted)
    assert (seen.number, seen.address) == (signal.SIGBUS, start)


def test_other_signals_reach_the_handler_that_was_there() -> None:
    source = """
import signal, mmap
from pyuffd import _memory
_memory.guarded_read(_memory.mmap(4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 1)
_memory.read(_memory.mmap(4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 1)
"""
    assert "Segmentation fault" in run_child(source, expect=-signal.SIGSEGV).stderr


def test_child_has_its_own_memory_and_ends_with_the_context(ctx: Context) -> None:
    region = ctx.make(1)
    region.write(0, b"parent")
    child = ctx.fork()
    assert child.write(region.start, b"child!") is None
    assert child.read(region.start, 6) == b"child!"
    assert region.read(0, 6) == b"parent"
    assert child.syscall(SYS_GETPID) == child.pid
    assert child.read(0, 1) == Interrupted(signal.SIGSEGV, 1, 0)
    ctx.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_child_holds_no_descriptor_of_the_parent(ctx: Context) -> None:
    missing(ctx)
    child = ctx.fork()
    child.syscall(SYS_GETPID)
    assert len(os.listdir(f"/proc/{child.pid}/fd")) == 1


@needs(Feature.EVENT_FORK)
def test_fork_with_the_event_on_gives_the_child_s_descriptor(ctx: Context) -> None:
    ctx.open(Feature.EVENT_FORK)
    start = missing(ctx)
    child = ctx.fork()
    assert child.uffd is not None
    access = ctx.start(child.read, start, 1)
    ctx.expect_fault(0, start, child.uffd)
    child.uffd.copy(start, b"c" * ctx.page)
    assert access.result() == b"c"
    ctx.expect_quiet()


@needs(Feature.EVENT_FORK)
def test_a_late_fork_finds_its_reader(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader gave up before, on a busy machine, and the fork waited for good."""
    ctx.open(Feature.EVENT_FORK)
    missing(ctx)
    fork_only = Context.fork_only

    def late(self: Context) -> Any:
        time.sleep(2 * SHORT_S)
        return fork_only(self)

    monkeypatch.setattr(Context, "fork_only", late)
    assert ctx.fork().uffd is not None


def test_fault_of_another_kind_or_none_is_a_mismatch(ctx: Context) -> None:
    start = missing(ctx)
    with pytest.raises(Mismatch, match="none within"):
        ctx.expect_fault(0, start)
    ctx.start(ctx.write, start, b"1")
    with pytest.raises(Mismatch, match=r"saw message 1 .*, expected message 3 at"):
        ctx.expect_fault(3, start)


def test_silent_access_may_neither_fault_nor_stall(ctx: Context) -> None:
    start = missing(ctx)
    with pytest.raises(Mismatch, match="message 0 "):
        ctx.silently(ctx.read, start)


def test_access_that_stalls_is_a_mismatch_and_the_end_frees_it(ctx: Context) -> None:
    start = missing(ctx)
    access = ctx.start(ctx.read, start)
    ctx.wait_readable()
    with pytest.raises(Mismatch, match="not completed"):
        access.result()
    ctx.close()
    assert access.done


def test_layout_event_left_unread_does_not_stop_the_end(ctx: Context) -> None:
    ctx.open(Feature.EVENT_REMOVE)
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    access = ctx.start(region.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    assert not access.done
    ctx.close()
    assert access.done


def test_monitor_resolves_counts_and_raises_what_its_function_raised(ctx: Context) -> None:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    ctx.uffd.writeprotect(region)

    def resolve(event: object) -> None:
        ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
        raise LookupError("on purpose")

    monitor = ctx.monitor(resolve)
    assert ctx.start(ctx.write, region.start, b"2").result() is None
    with pytest.raises(LookupError):
        monitor.stop()
    assert [type(fault) for fault in monitor.faults] == [Pagefault]


def test_event_of_another_class_is_a_mismatch(ctx: Context) -> None:
    start = missing(ctx)
    ctx.start(ctx.read, start)
    with pytest.raises(Mismatch, match="expected Remove"):
        ctx.expect_event(Remove)


@needs(Feature.MOVE)
def test_variant_that_the_features_rule_out_is_a_mismatch(ctx: Context) -> None:
    with pytest.raises(Mismatch):
        ctx.expect_variant("it", 2, now=1, never=2)
    assert ctx.expect_variant("it", 1, now=1, never=2) == "now"
    with pytest.raises(Mismatch):
        ctx.expect_variant("it", 2, now=1, never=2)
    with pytest.raises(LookupError):
        ctx.expect_variant("it", 1, other=1)


def test_pagemap_letters_and_wildcards(ctx: Context) -> None:
    region = ctx.make(1)
    ctx.expect_pagemap(region.start, "-----")
    region.fill(1)
    ctx.expect_pagemap(region.start, "P--?X", "-S---")
    with pytest.raises(Mismatch, match="saw P---X, expected -S--- or P-F--"):
        ctx.expect_pagemap(region.start, "-S---", "P-F--")


def test_failure_describes_what_there_is(ctx: Context) -> None:
    region = ctx.make(2)
    region.fill(1)
    ctx.expect("the answer", 42, 42)
    text = ctx.describe()
    assert f"feature mask {ctx.offered:#x}" in text
    assert "P---X P---X" in text
    assert "the answer: 42" in text
