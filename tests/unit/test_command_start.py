"""`pyuffd` is interrupted while it starts."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests._child import ROOT, limit_s

# Ctrl-C, when a module is looked for.
PROGRAM = """
import signal, sys
sys.argv[1:] = ["info", "--help"]
from importlib.abc import MetaPathFinder

class Interrupts(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {looked_for!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
signal.signal(signal.SIGINT, {handler})
from {module} import {function} as main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["pyuffd", "pyuffd._shim", "pyuffd.cli", "pyuffd.cli.info"])
@pytest.mark.parametrize(
    ("handler", "status"), [("signal.default_int_handler", 130), ("signal.SIG_IGN", 0)]
)
def test_ctrl_c_while_it_imports(module: str, handler: str, status: int) -> None:
    """It ends without a traceback; if SIGINT is ignored, as in the background, it continues."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    start, _, function = project["scripts"]["pyuffd"].partition(":")
    program = PROGRAM.format(looked_for=module, handler=handler, module=start, function=function)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=limit_s(60)
    )
    assert done.returncode == status, done.stderr
    assert not done.stderr
    assert bool(done.stdout) == (not status)
