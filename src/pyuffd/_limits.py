"""Find the limit that prevents a process, a thread, a descriptor or a file (layer L2)."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

from pyuffd import _machine
from pyuffd._describe import human_size
from pyuffd._errors import (
    UffdOSError,
    UffdPermissionError,
    limit_met,
    memory_limits,
    raise_errno,
)
from pyuffd._machine import PROC, read_text
from pyuffd._room import ROOM, has_room_for_thread, stack_size

CGROUPS = "/sys/fs/cgroup"
# Calls that fail with EAGAIN at the limit of processes or threads.
MAKE_TASKS = ("clone", "fork", "vfork", "pthread_create")
# What Python says of pthread_create(3), whose errno it does not tell.
NO_THREAD = "can't start new thread"
SECCOMP_FILTER = "2"  # of /proc/PID/status


def raise_start_error(what: str, code: int, call: str) -> NoReturn:
    """Raise the error of a system call that a driver needs to start; `call` is its name.

    EAGAIN is not a PartialResolveError here: it means that a limit of threads is reached.
    """
    cls = UffdPermissionError if code in (errno.EPERM, errno.EACCES) else UffdOSError
    raise cls(code, f"{what}: {call}", hint=why(code, call))


def raise_limit(what: str, code: int, **data: Any) -> NoReturn:
    """Raise the error of a call that makes threads or processes on its way.

    EAGAIN is not a PartialResolveError here: it means that a limit of them is reached.
    """
    if code == errno.EAGAIN:
        raise UffdOSError(code, what, hint=why_no_task(), **data)
    raise_errno(what, code, **data)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread; if that fails, raise an error that names the limit."""
    if not has_room_for_thread():
        because = _machine.why_no_memory(stack_size() + ROOM, accounted=False)
        raise UffdOSError(errno.ENOMEM, f"start the thread {thread.name}", hint=because)
    try:
        thread.start()
    except RuntimeError as error:
        if str(error) != NO_THREAD:  # as in an isolated sub-interpreter: no limit is met
            raise UffdOSError(
                errno.EOPNOTSUPP, f"start the thread {thread.name}", hint=str(error)
            ) from error
        raise UffdOSError(
            errno.EAGAIN, f"start the thread {thread.name}: pthread_create", hint=why_no_task()
        ) from error


def why(code: int, call: str) -> str:
    """Return the limit or filter that made a system call fail, and a remedy; "" if unknown."""
    with suppress(OSError, ValueError, KeyError, MemoryError):
        if code == errno.EAGAIN and call in MAKE_TASKS:
            return why_no_task()
        if code == errno.ENOMEM:
            return _machine.why_no_memory(stack_size(), accounted=False)
        if code in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            return _why_refused(code, call)
    return limit_met(code)


def why_error(error: BaseException) -> str:
    """Return the limit that an exception of Python is about; "" if there is none."""
    if isinstance(error, MemoryError):
        return why(errno.ENOMEM, "mmap")
    code = error.errno if isinstance(error, OSError) else None
    return limit_met(code) if code else ""


def raise_shortage(what: str, error: MemoryError) -> NoReturn:
    """Raise what an object that Python could not allocate means: MemoryError tells no limit."""
    because = next(memory_limits(ROOM), "no memory is left")
    raise UffdOSError(errno.ENOMEM, what, hint=because) from error


def limit_hint(error: OSError) -> str:
    """Return the end of a message about a process that could not be made; "" if unknown."""
    because = why(error.errno or 0, "fork")
    return f"; {because}" if because else ""


def why_no_task() -> str:
    """Return which limits prevent this process from making threads and processes.

    If no limit is reached any more, because tasks have ended meanwhile, return all limits.
    """
    limits = list(_task_limits())
    met = [text for text, used, limit in limits if used + 1 >= limit]
    return "; ".join(met or [text for text, _, _ in limits])


def _task_limits() -> Iterator[tuple[str, int, int]]:
    # Threads of a process are in one namespace.
    if os.readlink(f"{PROC}/self/ns/pid") != _pid_namespace_of_children():
        yield (
            "children live in another PID namespace (unshare(CLONE_NEWPID)), so that Linux allows"
            " no threads",
            1,
            0,
        )
    uid = os.getuid()
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and uid:  # root has no limit
        used = _tasks_of(uid)
        text = f"RLIMIT_NPROC is {soft}, and user {uid} has {used} processes and threads"
        yield f"{text}: raise it (`ulimit -u`)", used, soft
    with suppress(OSError, ValueError):
        yield from _cgroup_limits()
    for name, used_by, option in (("AS", "VmSize", "-v"), ("DATA", "VmData", "-d")):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        if soft != resource.RLIM_INFINITY:
            mapped, stack = _machine.status()[used_by], stack_size()
            sizes = [human_size(size) for size in (soft, mapped, stack)]
            text = "RLIMIT_{0} is {1}, {2} are used, and a thread maps a stack of {3}"
            text = f"{text.format(name, *sizes)}: raise it (`ulimit {option}`)"
            yield text, mapped + stack, soft
    most = _number("sys/kernel/threads-max")
    total = int(read_text(f"{PROC}/loadavg").split()[3].partition("/")[2])
    yield f"kernel.threads-max is {most}, and there are {total}", total, most


def _pid_namespace_of_children() -> str:
    """Return the name of the children's PID namespace; "" if it has no process yet."""
    try:
        return os.readlink(f"{PROC}/self/ns/pid_for_children")
    except FileNotFoundError:
        return ""


def _cgroup_limits() -> Iterator[tuple[str, int, int]]:
    for folder, files in cgroups("pids"):
        with suppress(OSError, ValueError):  # "max" means no limit
            with open(f"{files}/pids.max") as limit_file:
                limit = int(limit_file.read())
            with open(f"{files}/pids.current") as used_file:
                used = int(used_file.read())
            text = f"pids.max of the cgroup {folder} is {limit}, and {used} are used"
            yield f"{text}: raise it", used, limit


def cgroups(controller: str, pid: int | str = "self") -> Iterator[tuple[str, str]]:
    """Yield the name and the folder of each cgroup of a process, the innermost first."""
    for line in read_text(f"{PROC}/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = f"{CGROUPS}/{controller}" if controllers else CGROUPS
        while True:
            yield path or "/", f"{root}{path}"
            if path in ("", "/"):
                break
            path = path.rpartition("/")[0]


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory; -1 if that is unknown."""
    with suppress(OSError, ValueError), open(f"{PROC}/vmstat") as lines:
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return -1


def room_left(fd: int, code: int) -> str:
    """Return how full the file system of an open file is, or the limit that a write to it met."""
    if code not in (errno.ENOSPC, errno.EDQUOT):
        return limit_met(code)
    quota = "a disk quota is reached; " if code == errno.EDQUOT else ""
    with suppress(OSError):
        room = os.fstatvfs(fd)
        free, total = (
            human_size(blocks * room.f_frsize) for blocks in (room.f_bavail, room.f_blocks)
        )
        return f"{quota}its file system has {free} free of {total}"
    return ""


# What writing a file fails with, whoever calls it; EIO and ENOMEM may be of the memory instead.
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def why_not_written(fd: int, code: int) -> str:
    """Return the name of an open file that could not be written, and why; "" for other errors."""
    if code not in _OF_FILES:
        return ""
    name = f"descriptor {fd}"
    with suppress(OSError):
        name = os.readlink(f"/proc/self/fd/{fd}")
    return ": ".join(filter(None, (name, room_left(fd, code))))


def frozen_cgroup(tid: int) -> str:
    """Return the cgroup that keeps a thread frozen; "" if there is none.

    In the way of version 1 such a thread cannot be stopped by a tracer. In that of version 2 it
    can, but it runs nothing.
    """
    with suppress(OSError, ValueError):
        for folder, files in cgroups("freezer", tid):
            with suppress(OSError), open(f"{files}/freezer.state") as state:
                if state.read().strip() != "THAWED":
                    return folder
            # Beside hierarchies of version 1, that of version 2 has a folder of its own.
            for unified in (files, files.replace(CGROUPS, f"{CGROUPS}/unified", 1)):
                with suppress(OSError), open(f"{unified}/cgroup.events") as events:
                    if "frozen 1" in events.read().splitlines():
                        return folder
    return ""


def _tasks_of(uid: int) -> int:
    """Count the threads of a user's processes, as far as they can be seen."""
    count = 0
    for entry in os.scandir(PROC):
        with suppress(OSError, ValueError, KeyError):
            if entry.name.isdigit():
                status = _status(entry.name)
                if int(status["Uid"].split()[0]) == uid:  # the real one
                    count += int(status["Threads"])
    return count


def _status(process: str) -> dict[str, str]:
    lines = read_text(f"{PROC}/{process}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _why_refused(code: int, call: str) -> str:
    if _status("self").get("Seccomp") == SECCOMP_FILTER:
        return f"this process is under a seccomp filter (a container's?), which must allow {call}"
    return f"this kernel has no {call}" if code == errno.ENOSYS else ""


def _number(name: str) -> int:
    return int(read_text(f"{PROC}/{name}"))
