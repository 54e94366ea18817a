"""The soak test in its short form; `python -m tests.soak` has no end."""

from __future__ import annotations

from pathlib import Path

import pytest

from .soak import soak
from .test_attach import nothing_left

__all__ = ["nothing_left"]


@pytest.mark.guest(timeout=900)
def test_nothing_is_lost_while_servers_are_killed_upgraded_resized_and_swapped(tmp_path: Path) -> None:
    report = soak(20, 5, tmp_path, seed=1)
    print(report)
    assert report.io_errors == []
    assert report.lost_writes == 0
    assert report.kills >= 5
    assert report.upgrades >= 1
    assert report.swaps >= 1
    assert report.resizes >= 1
    assert report.trees >= 1
    assert report.probes > 0
