"""The tests with CRIU, which run as the first process of a PID namespace."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyuffd.criu import LazyPages, RemotePages, RestoreReport, tls_context
from pyuffd.testing._run import SCALE
from tests.criu._programs import children_of, served, serving

CRIU = os.environ.get("PYUFFD_CRIU", "criu")
LIMIT_S = 60.0


class Criu:
    """CRIU with its folders."""

    def __init__(self, folder: str) -> None:
        self.images = Path(folder) / "images"
        self.work = Path(folder) / "work"
        for path in (self.images, self.work):
            path.mkdir(exist_ok=True)

    def start(
        self, command: str, *options: str, before: Sequence[str] = (), fd: int = -1
    ) -> subprocess.Popen[bytes]:
        """Start a command of CRIU, with its log in the work dir."""
        return subprocess.Popen(
            [
                *before,
                *(CRIU, command, "-D", str(self.images), "-W", str(self.work)),
                *("-o", f"{command}.log", "-v4", *options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[fd] if fd >= 0 else [],
        )

    def start_ready(self, command: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a command, and wait until it says that it is ready."""
        ready, status = os.pipe()
        process = self.start(command, "--status-fd", str(status), *options, fd=status)
        os.close(status)
        with open(ready, "rb") as pipe:
            if not pipe.read(1):
                self.check(command, process)
        return process

    def run(self, command: str, *options: str) -> None:
        """Run a command of CRIU."""
        self.check(command, self.start(command, *options))

    def check(self, command: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for a command of CRIU."""
        if status_of(process):
            log = (self.work / f"{command}.log").read_text().splitlines()
            wrong = [line for line in log if "Error" in line and "RLIMIT_NOFILE" not in line]
            raise AssertionError(f"criu {command} failed: {wrong[:5] or log[-5:]}")

    def dump(self, process: subprocess.Popen[Any], *options: str) -> None:
        """Dump a process, which ends it."""
        self.run("dump", "-t", str(process.pid), *options)
        assert process.wait(LIMIT_S * SCALE) == -signal.SIGKILL
        # Its children are now ours, and their pids stay in use until we reap them.
        with suppress(ChildProcessError):
            while os.waitpid(-1, 0):
                pass

    def restore(self, *options: str) -> int:
        """Restore lazily, and return the pid; the process is then a child of this one."""
        pid = self.work / "pid"
        pid.unlink(missing_ok=True)
        self.run("restore", "--lazy-pages", "-d", "--pidfile", str(pid), *options)
        return int(pid.read_text())


def status_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process. Popen.wait() with a timeout would notice the end up to 50 ms late."""
    fd = os.pidfd_open(process.pid)
    try:
        select.select([fd], [], [], LIMIT_S * SCALE)
    finally:
        os.close(fd)
    return process.wait(0.1)


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    give_up = time.monotonic() + LIMIT_S * SCALE
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def start_target(folder: str, *words: str) -> subprocess.Popen[bytes]:
    """Start tests/criu/targets.c, and wait until it is ready."""
    ready = Path(folder) / "ready"
    process = subprocess.Popen(
        [str(Path(folder) / "targets"), str(ready), *words],
        start_new_session=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(ready.exists)
    return process


def build(folder: str) -> None:
    """Build it."""
    source = Path(__file__).with_name("targets.c")
    command = ["cc", "-O2", "-static", "-o", str(Path(folder) / "targets"), str(source)]
    subprocess.run(command, check=True)


def status_after_signal(pid: int) -> int:
    """Let a restored target check its memory, and return its exit status."""
    os.kill(pid, signal.SIGUSR1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told(reports: Sequence[RestoreReport]) -> list[dict[str, Any]]:
    """Return the reports as JSON."""
    return [report.as_dict() for report in reports]


def numbers(folder: str, mib: int, changes: bool, restores: int, threads: int) -> Any:
    """Restore a process that checks each word, once or several times in sequence."""
    criu = Criu(folder)
    build(folder)
    criu.dump(start_target(folder, str(mib), *(["changes"] if changes else [])))
    codes = []
    with served(criu.images, work_dir=criu.work, restores=restores, threads=threads) as server:
        for _ in range(restores):
            (Path(folder) / "ready").touch()
            codes.append(status_after_signal(criu.restore()))
    return [codes, told(server.reports)]


def worker_killed(folder: str, mib: int) -> Any:
    """Kill the worker process while the process checks its memory."""
    criu = Criu(folder)
    build(folder)
    criu.dump(start_target(folder, str(mib)))
    hot = criu.work / "hot"
    with LazyPages(criu.images, work_dir=criu.work, working_set=hot, record_s=1.0) as server:
        assert server._spare is not None
        keeper = server._spare.handler()._running_engine().pids()[0]  # type: ignore[attr-defined]
        with serving(server) as reports:
            pid = criu.restore()
            os.kill(pid, signal.SIGUSR1)
            for _ in range(3):
                time.sleep(0.05)
                os.kill(min(children_of(keeper)), signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [code, told(reports)]


def redis(folder: str, keys: int) -> Any:
    """Restore a redis-server with threads: the digest of its data is the same as before."""
    criu = Criu(folder)
    path = str(Path(folder) / "redis")
    server = subprocess.Popen(
        [
            *("redis-server", "--port", "0", "--unixsocket", path, "--save", ""),
            *("--enable-debug-command", "yes", "--dir", folder),
        ],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: os.path.exists(path))
    _asked_of_redis(path, f"DEBUG POPULATE {keys} key 100")
    before = [_asked_of_redis(path, words) for words in ("DEBUG DIGEST", "DBSIZE")]
    criu.dump(server)
    with served(criu.images, work_dir=criu.work) as lazy:
        pid = criu.restore()
        first = _asked_of_redis(path, f"GET key:{keys // 2}")
        after = [_asked_of_redis(path, words) for words in ("DEBUG DIGEST", "DBSIZE")]
    threads = len(os.listdir(f"/proc/{pid}/task"))
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    return [before, after, first, threads, told(lazy.reports)]


def _asked_of_redis(path: str, words: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S * SCALE)
        sock.connect(path)
        sock.sendall(words.encode() + b"\r\n")
        return sock.recv(1 << 16).decode()


TREE = """
import hashlib, os, signal, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for _ in range(3):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
zombie = os.fork()
if zombie == 0:
    os._exit(7)
child = os.fork()
who = os.getpid()
data = os.urandom(1 << 20) * 30
strings = [f"{who} {number}" * 3 for number in range(100_000)]
def digest():
    return hashlib.sha256(data + "".join(strings).encode()).hexdigest()
expected = digest()
open(sys.argv[1] + str(int(child == 0)), "w").close()
signal.sigwait([signal.SIGUSR1])
is_right = digest() == expected
if child == 0:
    os._exit(0 if is_right else 1)
os.kill(child, signal.SIGUSR1)
codes = [os.waitpid(pid, 0)[1] >> 8 for pid in (child, zombie)]
os._exit(0 if is_right and codes == [0, 7] else 2)
"""


def tree(folder: str) -> Any:
    """Restore a parent and a child of Python, with threads, and a zombie."""
    criu = Criu(folder)
    script = Path(folder) / "tree.py"
    script.write_text(TREE)
    ready = str(Path(folder) / "ready")
    process = subprocess.Popen(
        [sys.executable, str(script), ready],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: os.path.exists(ready + "0") and os.path.exists(ready + "1"))
    criu.dump(process)
    with served(criu.images, work_dir=criu.work) as lazy:
        code = status_after_signal(criu.restore())
    return [code, told(lazy.reports)]


@contextmanager
def large_pipes() -> Iterator[None]:
    """Raise the limit on pipe sizes: CRIU's page server needs 4 MiB, else only with privilege."""
    limit = Path("/proc/sys/fs/pipe-max-size")
    before = limit.read_text()
    limit.write_text(str(4 << 20))
    try:
        yield
    finally:
        limit.write_text(before)


def free_port() -> int:
    """Return a port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def remote(folder: str, mib: int, tls: bool) -> Any:
    """Restore with pages from `criu page-server`, twice."""
    criu = Criu(folder)
    build(folder)
    criu.dump(start_target(folder, str(mib)))
    port = free_port()
    address = ["--address", "127.0.0.1", "--port", str(port)]
    context = None
    options: list[str] = []
    if tls:
        files = {name: str(Path(folder) / f"{name}.pem") for name in ("cacert", "cert", "key")}
        make_certificates(folder)
        options = ["--tls", *(w for name, path in files.items() for w in (f"--tls-{name}", path))]
        context = tls_context(cacert=files["cacert"], cert=files["cert"], key=files["key"])
    with large_pipes():
        server = criu.start_ready("page-server", "--lazy-pages", *address, *options)
        codes = []
        try:
            with (
                RemotePages("127.0.0.1", port, tls=context) as pages,
                served(criu.images, work_dir=criu.work, restores=2, page_server=pages) as lazy,
            ):
                for _ in range(2):
                    (Path(folder) / "ready").touch()
                    codes.append(status_after_signal(criu.restore()))
            criu.check("page-server", server)
        finally:
            server.kill()
            server.wait()
    return [codes, told(lazy.reports)]


def make_certificates(folder: str) -> None:
    """Make an authority, and a certificate for both sides."""
    here = Path(folder)
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "basicConstraints=critical,CA:TRUE"]
    subject += ["-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-keyout", str(here / "key.pem"), "-out", str(here / "cert.pem")]
    subprocess.run([*openssl, *subject, *out], check=True, capture_output=True)
    (here / "cacert.pem").write_bytes((here / "cert.pem").read_bytes())


def migrate(folder: str, mib: int) -> Any:
    """Restore in another PID namespace a process that `criu dump --lazy-pages` keeps frozen."""
    criu = Criu(folder)
    build(folder)
    source = start_target(folder, str(mib))
    port = free_port()
    with large_pipes():
        dump = criu.start_ready(
            "dump",
            *("--lazy-pages", "--address", "127.0.0.1", "--port", str(port)),
            *("-t", str(source.pid)),
        )
        try:
            with (
                RemotePages("127.0.0.1", port) as pages,
                served(criu.images, work_dir=criu.work, page_server=pages) as lazy,
            ):
                restore = criu.start(
                    "restore",
                    "--lazy-pages",
                    before=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"],
                )
                wait_for(lambda: lazy.reports and lazy.reports[0].arrived_s)
                inner = children_of(children_of(restore.pid)[0])[0]
                os.kill(inner, signal.SIGUSR1)
                wait_for(lambda: not (Path(folder) / "ready").exists())
                restore.wait(LIMIT_S * SCALE)
            criu.check("dump", dump)
            code = source.wait(LIMIT_S * SCALE)
        finally:
            dump.kill()
            dump.wait()
    return [code, told(lazy.reports)]


def compare(folder: str, mib: int, rounds: int) -> Any:
    """Time restores until all pages are filled and the server has ended, alternating with CRIU's.

    Returns the seconds of `criu restore`, of everything, and of the server's CPU, for each server;
    and as "copies" those of benchmarks/c/copies.c, which only copies the same pages, in two
    threads.
    """
    criu = Criu(folder)
    build(folder)
    copies = str(Path(folder) / "copies")
    source = Path(__file__).parents[2] / "benchmarks" / "c" / "copies.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", copies, str(source)], check=True)
    criu.dump(start_target(folder, str(mib)))
    ours = [sys.executable, "-m", "pyuffd", "criu-lazy-pages"]
    times: dict[str, list[tuple[float, float, float]]] = {
        "criu": [],
        "pyuffd": [],
        "copies": [],
    }
    for _ in range(rounds):
        for name, command in (("criu", [CRIU, "lazy-pages"]), ("pyuffd", ours)):
            times[name].append(_timed(criu, command))
        base = [copies, str(criu.images / "pages-1.img"), str(mib), "2"]
        seconds = float(subprocess.run(base, check=True, stdout=subprocess.PIPE).stdout)
        times["copies"].append((0.0, seconds, 0.0))
    return times


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _timed(criu: Criu, command: Sequence[str]) -> tuple[float, float, float]:
    socket_path = criu.work / "lazy-pages.socket"
    socket_path.unlink(missing_ok=True)
    log = criu.work / "server.log"
    folders = ["-D", str(criu.images), "-W", str(criu.work)]
    with log.open("w") as out:
        server = subprocess.Popen([*command, *folders], stdout=out, stderr=out)
    wait_for(socket_path.exists)
    time.sleep(1.0)  # until it waits
    began = time.monotonic()
    pid = criu.restore()
    restored, before_s = time.monotonic(), _cpu_s()
    assert status_of(server) == 0, log.read_text()
    ended, cpu_s = time.monotonic(), _cpu_s() - before_s
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return restored - began, ended - began, cpu_s
