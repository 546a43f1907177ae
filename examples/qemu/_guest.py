"""A guest in QEMU, unmodified and without KVM, for the programs of this folder.

`Guest` starts QEMU with the program guest.s, which checks its own memory and says so, and talks to
QEMU over QMP: lines of JSON on a socket. Needs qemu-system-x86_64, as and ld.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from pyuffd import Process
from pyuffd.remote import Mapping

PROGRAM = "qemu-system-x86_64"
SOURCE = Path(__file__).with_name("guest.s")
# How the guest gets its memory, with the options of -object.
BACKENDS = {
    "anonymous": "memory-backend-ram",
    "memfd": "memory-backend-memfd,share=on",
    "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
    "file": "memory-backend-file,share=on,mem-path={folder}/ram",
}
# Of the guest's lines, and of QEMU's answers: a busy machine is slow, a working one is not.
LIMIT_S = 60.0


class Round(NamedTuple):
    """What the guest says 50 times a second: all that it looked at is as it was left."""

    number: int
    nonce: str


class Guest:
    """A guest that runs, or waits for the state of another; a context manager.

    Args:
        folder: Where its files are, and those of other guests.
        name: Its name there.
        backend: One of BACKENDS.
        mebibytes: How much memory it has.
        waits: Whether it waits for `load_state` instead of booting.
        options: More options of QEMU.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        backend: str = "memfd",
        mebibytes: int = 32,
        *,
        waits: bool = False,
        options: tuple[str, ...] = (),
    ) -> None:
        self.log = Path(folder) / f"{name}.log"
        self.mebibytes = mebibytes
        memory = BACKENDS[backend].format(folder=folder)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                *(PROGRAM, "-nodefaults", "-display", "none", "-vga", "none"),
                *("-accel", "tcg,tb-size=16", "-machine", "pc,memory-backend=ram"),
                *("-object", f"{memory},id=ram,size={mebibytes}M", "-m", str(mebibytes)),
                *("-kernel", str(built(Path(folder)))),
                *("-chardev", f"file,id=log,path={self.log}"),
                *("-device", "isa-debugcon,chardev=log,iobase=0xe9"),
                *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control"),
                *(("-incoming", "defer") if waits else ()),
                *options,
            ]
            self.qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self.pid = self.qemu.pid
        ours.settimeout(LIMIT_S)
        self._qmp = ours.makefile("rwb")
        ours.close()
        try:
            self._answer("QMP")
            self.ask("qmp_capabilities")
            # The memory is in our hands, so QEMU moves the state of the devices only.
            wanted = {"capability": "x-ignore-shared", "state": True}
            self.ask("migrate-set-capabilities", capabilities=[wanted])
        except BaseException:
            self.close()
            raise

    # QMP

    def ask(self, command: str, **arguments: object) -> Any:
        """Return QEMU's answer to a command."""
        line = json.dumps({"execute": command, "arguments": arguments})
        self._qmp.write(line.encode() + b"\n")
        self._qmp.flush()
        return self._answer("return")

    def _answer(self, key: str) -> Any:
        with contextlib.suppress(ConnectionResetError):
            for line in self._qmp:
                message = json.loads(line)
                if "error" in message:
                    raise RuntimeError(f"QEMU: {message['error']['desc']}")
                if key in message:
                    return message[key]  # all other lines are events
        raise RuntimeError(f"QEMU has ended, with status {self.qemu.wait()}")

    def stop(self) -> None:
        """Stop the guest, not QEMU: its memory stays as it is."""
        self.ask("stop")

    def cont(self) -> None:
        """Let the guest run on."""
        self.ask("cont")

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write the state of the devices to a file; the guest stops."""
        self.ask("migrate", uri=f"exec:cat > {path}")
        self._migrated()

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Read the state of the devices; afterwards `cont` lets the guest run."""
        self.ask("migrate-incoming", uri=f"exec:cat {path}")
        self._migrated()

    def _migrated(self) -> None:
        give_up = time.monotonic() + LIMIT_S
        while (found := self.ask("query-migrate")).get("status") != "completed":
            if found.get("status") == "failed" or time.monotonic() > give_up:
                raise RuntimeError(f"QEMU: {found}")
            time.sleep(0.01)

    # Its memory

    def ram(self, process: Process) -> Mapping:
        """Return the mapping of QEMU's that is the guest's memory."""
        text = self.ask("human-monitor-command", **{"command-line": "gpa2hva 0"})
        found = re.search(r"is (0x[0-9a-f]+)", text)
        mapping = process.mappings().at(int(found[1], 16)) if found else None
        if mapping is None:
            raise RuntimeError(f"QEMU: {text}")
        return mapping

    def ram_file(self, mapping: Mapping) -> str:
        """Return a path that opens the file of shared memory: one of QEMU's descriptors."""
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if (path.stat().st_dev, path.stat().st_ino) == (mapping.device, mapping.inode):
                    return str(path)
        raise RuntimeError(f"no descriptor of {mapping}")

    # What it says

    def rounds(self) -> list[Round]:
        """Return what the guest has said.

        Raises:
            RuntimeError: it has found that its memory is wrong.
        """
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        for line in lines:
            if not line.startswith("round "):
                raise RuntimeError(f"the guest says: {line}")
        return [Round(int(word[1], 16), word[3]) for word in map(str.split, lines)]

    def wait(self, more: int) -> list[Round]:
        """Wait until it has said so much more, and return all that it has said."""
        wanted, give_up = len(self.rounds()) + more, time.monotonic() + LIMIT_S
        while len(rounds := self.rounds()) < wanted:
            if self.qemu.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the guest is silent, QEMU's status is {self.qemu.poll()}")
            time.sleep(0.01)
        return rounds

    # Ending

    def close(self) -> None:
        """End QEMU."""
        self.qemu.send_signal(signal.SIGKILL)
        self.qemu.wait()
        with contextlib.suppress(OSError):
            self._qmp.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def built(folder: Path) -> Path:
    """Return the path of the guest's program, made in this folder."""
    path = folder / "guest"
    if not path.exists():
        made = f"{path}.o"
        subprocess.run(["as", "--32", "-o", made, str(SOURCE)], check=True)
        link = ["ld", "-m", "elf_i386", "-Ttext", "0x100000", "-o", str(path), made]
        subprocess.run(link, check=True)
    return path
