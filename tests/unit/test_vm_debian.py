"""tests/vm/get-kernel, with programs in place of apt that imitate a mirror."""

from __future__ import annotations

import os
import tarfile
import threading
from pathlib import Path

import pytest

from tests.vm import _debian
from tests.vm._debian import KernelNotFoundError, Package

# Where apt finds Debian: the label tells the security archive from the other.
TARGETS = (
    "Debian\tDebian\thttp://mirror/debian/\nDebian\tDebian-Security\thttp://mirror/security/\n"
)
MADISON = """\
 linux-image-5.10.0-46-cloud-amd64 | 5.10.262-1 | http://mirror bullseye-security/main
 linux-image-5.10.0-9-cloud-amd64 | 5.10.70-1 | http://mirror bullseye/main
 linux-image-6.12.117+deb13-cloud-amd64 | 6.12.117-1 | http://mirror trixie/main
 linux-image-6.12.9+deb13-cloud-amd64 | 6.12.9-1~bpo | http://mirror trixie/main
 linux-image-7.3.4+deb13-cloud-amd64 | 7.3.4-1 | http://mirror trixie-backports/main
 linux-binary-7.3.4+deb13-cloud-amd64 | 7.3.4-1 | http://mirror trixie-backports/main
"""
APT_GET = """#!/bin/sh
case "$*" in
*indextargets*) cat $HERE/targets;;
*download*) eval "name=\\${$#}"; echo "$name" >> $HERE/downloads; touch package.deb;;
esac
"""
APT_CACHE = """#!/bin/sh
case "$*" in
*madison*) cat $HERE/madison;;
*search*) cut -d' ' -f2 $HERE/madison;;
esac
"""
DPKG = """#!/bin/sh
test "$3" = gt && test "$2" != "$4" && test "$(printf '%s\\n' $2 $4 | sort -V | tail -1)" = "$2"
"""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = {
        "apt-get": APT_GET,
        "apt-cache": APT_CACHE,
        "dpkg": DPKG,
        "dpkg-deb": "#!/bin/sh\ncat $HERE/content.tar\n",
    }
    for name, script in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    (tmp_path / "targets").write_text(TARGETS)
    (tmp_path / "madison").write_text(MADISON)
    (tmp_path / "vmlinuz").write_bytes(b"a kernel")
    contain(tmp_path, "./boot/vmlinuz-6.12.117+deb13-cloud-amd64")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def contain(mirror: Path, name: str) -> None:
    """Put a kernel under this name into every package of the mirror."""
    with tarfile.open(mirror / "content.tar", "w") as archive:
        archive.add(mirror / "vmlinuz", name)


def downloads(mirror: Path) -> list[str]:
    return (mirror / "downloads").read_text().split()


def test_newest_of_a_series_and_then_the_cache(mirror: Path) -> None:
    kernel = _debian.kernel("6.12")
    assert kernel.name == "vmlinuz-6.12.117+deb13-cloud-amd64"
    assert kernel.read_bytes() == b"a kernel"
    assert _debian.kernel("6.12") == kernel
    assert downloads(mirror) == ["linux-image-6.12.117+deb13-cloud-amd64=6.12.117-1"]
    _debian.kernel("6.12", refresh=True)
    assert len(downloads(mirror)) == 2


def test_one_release(mirror: Path) -> None:
    _debian.kernel("6.12.9")
    assert downloads(mirror) == ["linux-image-6.12.9+deb13-cloud-amd64=6.12.9-1~bpo"]


def test_the_name_has_the_release_where_debian_s_has_not(mirror: Path) -> None:
    contain(mirror, "./boot/vmlinuz-5.10.0-46-cloud-amd64")
    assert _debian.kernel("5.10").name == "vmlinuz-5.10.262-5.10.0-46-cloud-amd64"


def test_from_6_19_on_the_kernel_is_in_another_package_and_place(mirror: Path) -> None:
    contain(mirror, "./usr/lib/modules/7.3.4+deb13-cloud-amd64/vmlinuz")
    assert _debian.kernel("7.3").name == "vmlinuz-7.3.4+deb13-cloud-amd64"
    assert downloads(mirror) == ["linux-binary-7.3.4+deb13-cloud-amd64=7.3.4-1"]


@pytest.mark.parametrize("version", ["6.1", "6.12.11", "4.9"])
def test_a_version_that_the_mirror_lacks(mirror: Path, version: str) -> None:
    with pytest.raises(KernelNotFoundError, match=r"it has 5\.10, 6\.12, 7\.3"):
        _debian.kernel(version)


@pytest.mark.parametrize("version", ["", "six", "6.12; true", "../6.12", "6"])
def test_what_is_no_version(version: str) -> None:
    with pytest.raises(KernelNotFoundError, match="is no kernel version"):
        _debian.kernel(version)


def test_a_package_without_a_kernel(mirror: Path) -> None:
    contain(mirror, "./boot/config")
    with pytest.raises(KernelNotFoundError, match="has no vmlinuz"):
        _debian.kernel("6.12")
    assert not list((mirror / "cache").rglob("*.deb"))


def test_the_mirror_is_the_machine_s_own(mirror: Path) -> None:
    _debian.kernel("6.12")
    (sources,) = (mirror / "cache").rglob("sources.list")
    text = sources.read_text()
    assert "http://mirror/debian/ trixie-backports main" in text
    assert "http://mirror/security/ bullseye-security main" in text


def test_one_at_a_time(mirror: Path) -> None:
    # An update replaces the lists that a look-up reads.
    (mirror / "bin/apt-get").write_text(
        APT_GET.replace("in\n", "in\n*update*) rm -f $HERE/lists; sleep 0.5; touch $HERE/lists;;\n")
    )
    (mirror / "bin/apt-cache").write_text(
        APT_CACHE.replace("case", "sleep 0.1; test -e $HERE/lists || exit 100\ncase", 1)
    )
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda version=version: found.append(_debian.kernel(version)))
        for version in ("6.12", "6.12.9")
    ]
    threads[0].start()
    while not (mirror / "lists").exists():
        threads[0].join(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 2


def test_no_debian_mirror_here(mirror: Path) -> None:
    (mirror / "targets").write_text("Ubuntu\tUbuntu\thttp://other/\n")
    with pytest.raises(KernelNotFoundError, match="name no Debian mirror"):
        _debian.kernel("6.12")


def test_no_apt_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelNotFoundError, match="no apt-get here"):
        _debian.kernel("6.12")


def test_upstream_version() -> None:
    assert Package("linux-image", "6.12.117-1~deb12u1").upstream == "6.12.117"
