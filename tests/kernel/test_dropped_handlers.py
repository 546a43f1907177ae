"""A handler without references, and its claim on its userfaultfd."""

from __future__ import annotations

import gc
import weakref

import pytest

from pyuffd import Feature, Handler, Region, Userfaultfd, ZeroSource, lazy
from pyuffd.testing import no_leaks


@pytest.mark.filterwarnings("ignore:unstopped:ResourceWarning")
@pytest.mark.parametrize(
    ("driver", "features"),
    [("native", Feature(0)), ("thread", Feature(0)), ("inline", Feature.SIGBUS)],
)
def test_unused_handler_is_collected(driver: str, features: Feature) -> None:
    with Userfaultfd(features=features) as uffd, Region.anonymous(4096) as region:
        Handler(uffd, driver=driver)  # type: ignore[arg-type]
        gc.collect()
        with Handler(uffd, driver=driver) as handler:  # type: ignore[arg-type]
            handler.serve(region, ZeroSource())
            assert region.read() == bytes(4096)


def test_handler_that_serves_stays() -> None:
    with Userfaultfd() as uffd, Region.anonymous(4096) as region:
        handler = Handler(uffd, driver="native")
        handler.serve(region, ZeroSource())
        handler.start()
        alive = weakref.ref(handler)
        del handler
        gc.collect()
        assert region.read() == bytes(4096)
        with pytest.raises(ValueError, match="has a handler already, which must be closed first"):
            Handler(uffd)
        assert alive() is not None


def test_stopped_handler_is_no_circle() -> None:
    with Userfaultfd() as uffd:
        with Handler(uffd, driver="native") as handler:
            pass
        assert handler._at_close.keeps is None


@pytest.mark.filterwarnings("ignore:un:ResourceWarning")
@pytest.mark.parametrize("driver", ["native", "inline"])
def test_ends_as_garbage_in_a_circle(
    driver: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with no_leaks():
        memory = lazy(b"x" * 8192, driver=driver)  # type: ignore[arg-type]
        memory.read(0, 1)
        memory.handler.circle = memory  # type: ignore[attr-defined]
        alive = weakref.ref(memory.handler)
        del memory
        gc.collect()
        assert alive() is None
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
