"""`probe` gives the answers that plain system calls get."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

import pyuffd
from pyuffd import Feature, Ioctl, KernelSupport, RegisterMode, Userfaultfd, probe
from pyuffd.testing import MEMORY_TYPES, needs, needs_hugepages
from pyuffd.testing._need import kernel_features, range_ioctls

pytestmark = needs(Feature(0))

PRESENT = [
    pytest.param(name, marks=[needs_hugepages(1)] if name.startswith("hugetlb") else [])
    for name in MEMORY_TYPES
]


@pytest.fixture(scope="module")
def support() -> KernelSupport:
    return probe()


def test_features_are_the_kernel_s(support: KernelSupport) -> None:
    assert int(support.features) == kernel_features()
    assert support.release == os.uname().release
    assert Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API in support.ioctls


@pytest.mark.parametrize("memory", PRESENT)
@pytest.mark.parametrize("mode", RegisterMode)
def test_register_masks_are_the_kernel_s(
    support: KernelSupport, memory: str, mode: RegisterMode
) -> None:
    features = int(support.features & Feature.RWP) if mode == RegisterMode.RWP else 0
    found = support.memory[memory][mode]
    assert int(found.ioctls) == range_ioctls(memory, int(mode), features)
    assert bool(found.errno) == (not found.ioctls)


def test_minor_faults_are_not_for_anonymous_memory(support: KernelSupport) -> None:
    assert support.memory["anon"][RegisterMode.MINOR].errno == errno.EINVAL


def test_every_memory_type_is_asked_in_every_mode(support: KernelSupport) -> None:
    assert {name: set(modes) for name, modes in support.memory.items()} == {
        name: set(RegisterMode) for name in MEMORY_TYPES
    }


def test_refused_features_are_those_that_cannot_be_enabled(support: KernelSupport) -> None:
    for feature in support.features & ~Feature.RWP_ASYNC:
        refused = False
        try:
            Userfaultfd(features=feature, user_mode_only=not support.kernel_faults).close()
        except pyuffd.UffdPermissionError:
            refused = True
        assert refused == (feature in support.refused), feature


def test_device_works_if_it_can_be_opened(support: KernelSupport) -> None:
    try:
        os.close(os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC))
        expected = 0
    except OSError as error:
        expected = error.errno or 0
    found = support.opens["device"]
    assert found.errno == expected
    assert found.works == (expected == 0)
    assert bool(found.reason) == (not found.works)


def test_pagemap_scan_is_there_where_its_write_protection_is(support: KernelSupport) -> None:
    # Both came with one merge, Linux 6.7.
    assert support.pagemap_scan == bool(support.features & Feature.WP_ASYNC)


def test_nothing_stays_mapped_or_reserved() -> None:
    probe()
    assert "pyuffd-probe" not in Path("/proc/self/maps").read_text()


def test_unknown_bits_are_kept(support: KernelSupport) -> None:
    unknown = Feature(1 << 62)
    changed = dataclasses.replace(support, features=support.features | unknown)
    assert changed.unknown_features == support.unknown_features | unknown
    assert unknown in changed.features
