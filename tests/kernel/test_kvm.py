"""What docs/help/troubleshooting.md says about KVM: it touches the guest's memory in the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

import pytest

import pyuffd
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked, needs_kernel_faults
from tests._child import run_child

DEVICE = "/dev/kvm"
KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE = 0xAE01, 0xAE04
KVM_CREATE_VCPU, KVM_RUN, KVM_SET_USER_MEMORY_REGION = 0xAE41, 0xAE80, 0x4020AE46
EXIT_HLT, EXIT_INTERNAL_ERROR, EXIT_MEMORY_FAULT = 5, 17, 39
EXIT_REASON = 8  # its offset in struct kvm_run
# A CPU begins 16 bytes below 4 GiB; the guest's only page ends there, and is full of `hlt`.
GUEST_ADDRESS, HLT = 0xFFFFF000, b"\xf4"


def needs_kvm() -> pytest.MarkDecorator:
    """Skip where no virtual machine can be made."""

    def missing() -> tuple[list[str], str]:
        return ([] if os.access(DEVICE, os.R_OK | os.W_OK) else ["kvm"]), f"there is no {DEVICE}"

    return marked(Need("KVM", missing))


pytestmark = needs_kvm()


def run_guest(user_mode_only: bool) -> list[int]:
    """Run a guest whose page is missing; return errno, the reason of its exit, and the faults."""
    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    cpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    code = 0
    with (
        pyuffd.lazy(HLT * mmap.PAGESIZE, user_mode_only=user_mode_only) as memory,
        mmap.mmap(cpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)) as state,
    ):
        slot = struct.pack("<IIQQQ", 0, 0, GUEST_ADDRESS, memory.length, memory.start)
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, slot)
        try:
            fcntl.ioctl(cpu, KVM_RUN, 0)
        except OSError as error:
            code = error.errno or 0
        (reason,) = struct.unpack_from("<I", state, EXIT_REASON)
        faults = memory.handler.stats().faults["missing"]
        for fd in (cpu, vm, kvm):
            os.close(fd)
    return [code, reason, faults]


@needs_kernel_faults()
def test_a_guest_gets_its_page() -> None:
    assert run_child(run_guest, False).value == [0, EXIT_HLT, 1]


def test_without_faults_of_the_kernel_it_fails() -> None:
    """With EFAULT, or, where KVM has to emulate the instruction, with an internal error."""
    code, reason, faults = run_child(run_guest, True).value
    assert (code, reason) in (
        (errno.EFAULT, 0),
        (errno.EFAULT, EXIT_MEMORY_FAULT),
        (0, EXIT_INTERNAL_ERROR),
    )
    assert faults == 0
