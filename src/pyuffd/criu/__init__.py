"""CRIU's lazy restore: serve the pages of `criu restore --lazy-pages` (layer L5).

`LazyPages` takes the place of `criu lazy-pages`, with images in files here, or with pages from
CRIU's page server (`RemotePages`); `pyuffd criu-lazy-pages` is the same as a command
(docs/criu.md). It needs the package protobuf (`pip install 'pyuffd[criu]'`).
"""

from __future__ import annotations

from pyuffd.criu._images import Images, LazySpan, TaskImage
from pyuffd.criu._page_server import RemotePages, tls_context
from pyuffd.criu._restore import RestoreReport
from pyuffd.criu._server import LazyPages

__all__ = [
    "Images",
    "LazyPages",
    "LazySpan",
    "RemotePages",
    "RestoreReport",
    "TaskImage",
    "tls_context",
]
