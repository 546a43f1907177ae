"""The program of the guest: it sets up swap, runs the tests, and sends files to the host.

The first serial port is the console. The second carries one line for each message to the host, and
the third one tar archive of /out.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import struct
import subprocess
import tarfile
import termios
from pathlib import Path

CONTROL = "/dev/ttyS1"
ARCHIVE = "/dev/ttyS2"
OUT = Path("/out")
DISK = Path("/dev/nvme0n1")
COVERAGE = Path("/sys/kernel/debug/gcov")
ZRAM = Path("/sys/block/zram0/disksize")

_NR_USERFAULTFD = 323
_PAGE = 4096


def main() -> None:
    """Do the job, and report how it ended."""
    job = json.loads(Path("/vm/job.json").read_text())
    say(f"up {Path('/proc/uptime').read_text().split()[0]}")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(_NR_USERFAULTFD), os.O_CLOEXEC)
    if fd < 0 and ctypes.get_errno() == errno.ENOSYS:
        say("no-userfaultfd")
        return
    if fd >= 0:
        os.close(fd)
    say(f"swap {swap_on(libc, job['swap_bytes']) or 'none: no NVMe and no zram in this kernel'}")
    pool = Path("/proc/sys/vm/nr_hugepages")
    say(f"hugepages {pool.read_text().strip() if pool.exists() else 'none: no hugetlb here'}")
    OUT.mkdir(exist_ok=True)
    status = subprocess.run(job["command"], env={**os.environ, **job["env"]}, cwd=job["cwd"])
    with (OUT / "dmesg.txt").open("wb") as file:
        subprocess.run(["dmesg"], stdout=file)
    if COVERAGE.is_dir():
        collect_coverage()
    send_files()
    code = status.returncode
    say(f"status {code if code >= 0 else 128 - code}")


def say(line: str) -> None:
    """Send a line to the host, and print it on the console."""
    print(f"guest: {line}", flush=True)
    with open(CONTROL, "wb", buffering=0) as port:
        port.write(line.encode() + b"\n")
        termios.tcdrain(port)


def send_files() -> None:
    """Send /out through the third serial port, untouched by the line discipline."""
    with open(ARCHIVE, "wb") as port:
        attributes = termios.tcgetattr(port)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(port, termios.TCSANOW, attributes)
        with tarfile.open(fileobj=port, mode="w|gz") as archive:
            archive.add(OUT, arcname=".")
        port.flush()
        termios.tcdrain(port)


def collect_coverage() -> None:
    """Put the counts of a kernel with CONFIG_GCOV_KERNEL into /out."""
    with tarfile.open(OUT / "gcov.tar", "w") as archive:
        for file in COVERAGE.rglob("*.gcda"):
            data = file.read_bytes()  # debugfs reports no size
            entry = tarfile.TarInfo(str(file.relative_to(COVERAGE)))
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def swap_on(libc: ctypes.CDLL, length: int) -> str | None:
    """Use a disk or compressed memory for swap; return which, or None if there is neither."""
    if DISK.exists():
        device = DISK
    elif ZRAM.exists():
        ZRAM.write_text(str(length))
        device = Path("/dev/zram0")
    else:
        return None
    header = bytearray(_PAGE)
    struct.pack_into("<3I", header, 1024, 1, length // _PAGE - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    with device.open("r+b", buffering=0) as file:
        file.write(header)
        os.fsync(file.fileno())
    if libc.swapon(bytes(device), 0):
        return f"none: {device}: {os.strerror(ctypes.get_errno())}"
    return str(device)


if __name__ == "__main__":
    main()
