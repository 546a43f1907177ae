"""The faulting threads (``c/toucher.c``), called through ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
import os
from array import array
from dataclasses import dataclass

#: Seed of the page order; the same as TOUCH_SEED in ``c/toucher.h``.
SEED = 0x9E3779B97F4A7C15


class _Job(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("ns", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("pause_ns", ctypes.c_uint64),
        ("write", ctypes.c_int32),
        ("cpu", ctypes.c_int32),
        ("cpu_ns", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Touched:
    """The measurements of the faulting threads.

    Attributes:
        wall_ns: from the first touch to the end of the last.
        cpu_ns: CPU time of the faulting threads.
        samples: latency of each touch in ns; empty if they were not timed.
    """

    wall_ns: int
    cpu_ns: int
    samples: array[int]


class Toucher:
    """C threads that touch pages, so that a fault never holds the GIL."""

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.touch_order.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
        self._lib.touch_order.restype = None
        self._lib.touch_run.argtypes = (
            ctypes.POINTER(_Job),
            ctypes.c_uint32,
            ctypes.POINTER(ctypes.c_uint64),
        )
        self._lib.touch_run.restype = ctypes.c_int

    def order(self, count: int, seed: int) -> array[int]:
        """Return the page indexes 0..count-1, shuffled unless `seed` is 0."""
        order = array("I", bytes(4 * count))
        self._lib.touch_order(order.buffer_info()[0], count, seed)
        return order

    def run(
        self,
        start: int,
        order: array[int],
        *,
        page_size: int,
        threads: int = 1,
        cpu: int = -1,
        write: bool = False,
        timed: bool = True,
        pause_ns: int = 0,
    ) -> Touched:
        """Touch the pages of `order`, shared evenly by `threads`, and wait for the end.

        Args:
            start: address of page 0.
            order: page indexes in the order they are touched.
            page_size: bytes from one page to the next.
            threads: number of faulting threads; it divides ``len(order)``.
            cpu: CPU of the first thread; the others run on the CPUs after it. -1: any.
            write: write a byte instead of reading one.
            timed: time each touch.
            pause_ns: sleep before each touch.

        Raises:
            OSError: a thread could not be created.
        """
        share, rest = divmod(len(order), threads)
        if rest:
            raise ValueError(f"{threads} threads cannot share {len(order)} pages evenly")
        samples = array("Q", bytes(8 * len(order) if timed else 0))
        jobs = (_Job * threads)()
        for i, job in enumerate(jobs):
            job.base = start
            job.order = order.buffer_info()[0] + i * share * order.itemsize
            job.ns = samples.buffer_info()[0] + i * share * samples.itemsize if timed else None
            job.count = share
            job.page_size = page_size
            job.pause_ns = pause_ns
            job.write = write
            job.cpu = cpu + i if cpu >= 0 else -1
        wall_ns = ctypes.c_uint64()
        ret = self._lib.touch_run(jobs, threads, ctypes.byref(wall_ns))
        if ret:
            raise OSError(-ret, os.strerror(-ret))
        return Touched(wall_ns.value, sum(job.cpu_ns for job in jobs), samples)
