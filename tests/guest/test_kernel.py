"""What the project takes for granted of the kernel, without any of its own code."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

HBA = Path("/sys/kernel/config/target/core/user_900")
UIO = Path("/sys/class/uio")


@pytest.fixture
def backstore() -> Iterator[Path]:
    device = HBA / "plain"
    device.mkdir(parents=True)
    # Nobody listens to netlink here, so the kernel must not wait for an answer.
    for setting in (
        "dev_config=test/plain",
        "dev_size=1048576",
        "hw_block_size=512",
        "nl_reply_supported=-1",
    ):
        (device / "control").write_text(setting)
    (device / "enable").write_text("1")
    yield device
    device.rmdir()
    HBA.rmdir()


def uio_names() -> dict[str, str]:
    return {path.name: (path / "name").read_text().strip() for path in UIO.iterdir()}


def test_a_backstore_appears_as_a_uio_device_and_goes_with_it(backstore: Path) -> None:
    (uio,) = (uio for uio, name in uio_names().items() if name == "tcm-user/900/plain/test/plain")
    assert stat.S_ISCHR(Path("/dev", uio).stat().st_mode)
    assert "ACTIVATED" in (backstore / "info").read_text()


def test_no_backstore_is_left_behind() -> None:
    assert "tcm-user/900/plain/test/plain" not in uio_names().values()


def test_two_cpus() -> None:
    """Races need them."""
    assert len(os.sched_getaffinity(0)) == 2
