"""`pyuffd criu-lazy-pages`: serve the pages of `criu restore --lazy-pages` (layer L6)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import queue
import resource
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pyuffd import CriuError
from pyuffd.cli._counted import counted

if TYPE_CHECKING:
    from pyuffd.criu import Images, LazyPages, RemotePages, RestoreReport

    Wire = Literal["4.1", "4.2"]

EXIT_FAILED = 1
EXIT_MISSING = 2

MIB = float(1 << 20)
PROGRESS_S = 1.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `criu-lazy-pages` command."""
    parser = subparsers.add_parser(
        "criu-lazy-pages",
        description="Serve the pages of `criu restore --lazy-pages`, in place of `criu lazy-pages`:"
        " the processes run at once, pages that they touch are filled first, and the rest in the"
        " background. Options named like CRIU's mean the same.",
        epilog="Exit status: 0 if all restores were served, 1 if one failed, 2 on an error before"
        " the first. On SIGTERM or Ctrl-C, the running restores are completed and no more are"
        " served. On a second one the command ends at once, and poisons the pages that have not"
        " been filled.",
    )
    parser.add_argument(
        "-D", "--images-dir", default=".", metavar="DIR", help="the images (working directory)"
    )
    parser.add_argument(
        "-W", "--work-dir", metavar="DIR", help="where CRIU looks for the socket (--images-dir)"
    )
    parser.add_argument(
        "-o", "--log-file", metavar="FILE", help="log to this file, in the work dir (stderr)"
    )
    parser.add_argument("-v", dest="verbosity", nargs="?", const="1", help="-v4: all messages")
    parser.add_argument(
        "-d", "--daemon", action="store_true", help="run in the background once it listens"
    )
    parser.add_argument("--pidfile", metavar="FILE", help="write the pid, in the work dir")
    parser.add_argument(
        "--status-fd",
        type=int,
        metavar="FD",
        help="write a zero byte to this descriptor, and close it, once it listens",
    )
    parser.add_argument(
        "--restores",
        type=_count,
        default=1,
        metavar="N",
        help="serve N restores of these images (1); 0: any number, until SIGTERM",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="threads that fill in the background (one for each CPU, up to 8)",
    )
    parser.add_argument(
        "--working-set",
        metavar="FILE",
        help="fill the pages listed in this file first; write it if missing or of other images",
    )
    parser.add_argument(
        "--record-for",
        type=float,
        default=5.0,
        metavar="S",
        help="to record a working set, only answer faults for this many seconds (5)",
    )
    remote = parser.add_argument_group("pages from a page server instead of local files")
    remote.add_argument(
        "--page-server", action="store_true", help="ask the page server at --address and --port"
    )
    remote.add_argument("--address", default="127.0.0.1", help="its host (127.0.0.1)")
    remote.add_argument("--port", type=_count, help="its port")
    remote.add_argument(
        "--wire",
        choices=("4.1", "4.2"),
        help="its protocol: 4.2 for CRIU 4.2 and newer, else 4.1 (as the images say)",
    )
    remote.add_argument("--tls", action="store_true", help="use TLS")
    remote.add_argument("--tls-cacert", default="/etc/pki/CA/cacert.pem", metavar="FILE")
    remote.add_argument("--tls-cacrl", metavar="FILE")
    remote.add_argument("--tls-cert", default="/etc/pki/criu/cert.pem", metavar="FILE")
    remote.add_argument("--tls-key", default="/etc/pki/criu/private/key.pem", metavar="FILE")
    remote.add_argument("--tls-no-cn-verify", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return value


def _has_protobuf() -> bool:
    try:
        return importlib.util.find_spec("google.protobuf") is not None
    except ModuleNotFoundError:  # there is no package `google`
        return False


def run(args: argparse.Namespace) -> int:
    """Serve until the restores are complete."""
    if not _has_protobuf():
        print("pyuffd: CRIU's images need protobuf: pip install 'pyuffd[criu]'", file=sys.stderr)
        return EXIT_MISSING
    started = _Background() if args.daemon else None
    if started is not None and started.is_parent:
        return started.wait()
    work_dir = os.path.abspath(args.work_dir or args.images_dir)
    _set_up_log(args, work_dir)
    _raise_limit()
    from pyuffd.criu import Images

    images = Images(os.path.abspath(args.images_dir), is_remote=args.page_server)
    with _page_server(args, images) as page_server:
        reports = _serve(args, images, work_dir, page_server, started)
        is_failed = any(report.error for report in reports)
        if is_failed and page_server is not None:
            page_server.abandon()
    return EXIT_FAILED if is_failed else 0


def _serve(
    args: argparse.Namespace,
    images: Images,
    work_dir: str,
    page_server: RemotePages | None,
    started: _Background | None,
) -> list[RestoreReport]:
    from pyuffd.criu import LazyPages

    out = _Output(is_json=args.json)
    with LazyPages(
        images,
        work_dir=work_dir,
        restores=args.restores,
        threads=args.threads or None,
        working_set=args.working_set,
        record_s=args.record_for,
        page_server=page_server,
        finished=out.restored,
    ) as server:
        before = _stop_at_signals(server)
        try:
            if args.pidfile:
                with open(os.path.join(work_dir, args.pidfile), "w", encoding="ascii") as file:
                    file.write(str(os.getpid()))
            out.listening(os.path.join(work_dir, os.path.basename(server.path)))
            _tell_ready(args.status_fd)
            if started is not None:
                started.tell()
            with _Progress(server, out):
                return server.serve()
        finally:
            for number, action in before.items():
                signal.signal(number, action)


def _page_server(
    args: argparse.Namespace, images: Images
) -> AbstractContextManager[RemotePages | None]:
    """Connect to the page server, if there is one."""
    if not args.page_server:
        return nullcontext()
    if args.port is None:
        raise CriuError("page-server", "--page-server needs --port")
    from pyuffd.criu import RemotePages, tls_context

    tls = None
    if args.tls:
        tls = tls_context(
            cacert=args.tls_cacert,
            cacrl=args.tls_cacrl,
            cert=args.tls_cert,
            key=args.tls_key,
            verifies_name=not args.tls_no_cn_verify,
        )
    wire: Wire = args.wire or ("4.2" if images.has_long_counts else "4.1")
    return RemotePages(args.address, args.port, wire=wire, tls=tls)


def _set_up_log(args: argparse.Namespace, work_dir: str) -> None:
    level = logging.DEBUG if (args.verbosity or "0").strip("v") >= "4" else logging.WARNING
    path = os.path.join(work_dir, args.log_file) if args.log_file else None
    logging.basicConfig(filename=path, level=level, format="%(asctime)s %(message)s")


def _raise_limit() -> None:
    """Raise the limit on open files as far as allowed: each mapping needs a few descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tell_ready(status_fd: int | None) -> None:
    if status_fd is not None:
        os.write(status_fd, b"\0")
        os.close(status_fd)


def _stop_at_signals(server: LazyPages) -> dict[int, Any]:
    seen: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        server.stop(now=bool(seen))
        seen.append(number)

    return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}


class _Background:
    """A child that continues in the background; the parent waits until it listens."""

    def __init__(self) -> None:
        self._ready, ready = os.pipe()
        self.is_parent = os.fork() != 0
        if self.is_parent:
            os.close(ready)
            return
        os.close(self._ready)
        self._ready = ready
        os.setsid()

    def wait(self) -> int:
        """Return the exit status of the parent."""
        with open(self._ready, "rb") as pipe:
            return 0 if pipe.read(1) else EXIT_MISSING

    def tell(self) -> None:
        """Let the parent end."""
        os.write(self._ready, b"\0")
        os.close(self._ready)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)


class _Output:
    """The lines that are printed."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json

    def _print(self, event: str, text: str, **data: object) -> None:
        line = json.dumps({"event": event, **data}) if self._is_json else text
        # One write: several threads print, without a lock that a signal could leave held.
        print(f"{line}\n", end="", flush=True)

    def listening(self, path: str) -> None:
        """Print where the socket is."""
        self._print("listening", f"listening at {path}", socket=path)

    def progress(self, report: RestoreReport) -> None:
        """Print the progress of a restore."""
        loaded, content = report.loaded_bytes, report.content_bytes
        self._print(
            "progress",
            f"restore {report.number}: {loaded / MIB:.0f} of {content / MIB:.0f} MiB",
            number=report.number,
            loaded_bytes=loaded,
            content_bytes=content,
        )

    def restored(self, report: RestoreReport) -> None:
        """Print the result of a restore."""
        if report.error:
            text = f"restore {report.number} failed: {report.error}"
        else:
            text = (
                f"restore {report.number}: {counted(report.processes, 'process', 'processes')},"
                f" {report.content_bytes / MIB:.1f} MiB filled in {report.drained_s:.2f} s,"
                f" {counted(report.faults, 'page')} by faults"
                f" (p50 {report.fault_p50_us:.0f} us, p99 {report.fault_p99_us:.0f} us)"
            )
            text += f", {report.hot_bytes / MIB:.1f} MiB of them hot" if report.hot_bytes else ""
            recorded = report.recorded_pages
            text += f"; working set of {counted(recorded, 'page')} written" if recorded else ""
        self._print("restore", text, **report.as_dict())


class _Progress:
    """A thread that prints the progress of running restores."""

    def __init__(self, server: LazyPages, out: _Output) -> None:
        self._server = server
        self._out = out
        # Its methods are written in C, so a signal handler cannot run while one holds its lock.
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="criu-progress")

    def _run(self) -> None:
        while not self._has_ended():
            for report in self._server.reports:
                if report.arrived_s and not report.drained_s and not report.error:
                    self._out.progress(report)

    def _has_ended(self) -> bool:
        try:
            self._ended.get(timeout=PROGRESS_S)
        except queue.Empty:
            return False
        return True

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.put(None)
        self._thread.join()
