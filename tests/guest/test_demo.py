"""The demo, with less to copy."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests import demo

FLAGS = re.MULTILINE | re.DOTALL


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(demo, "SOURCE", demo.SOURCE / "email")
    return io.StringIO()


def test_it_tells_what_it_does_and_that_all_went_well(screen: io.StringIO) -> None:
    assert demo.run_here(demo.Narrator(Console(file=screen))) == 0
    steps = re.findall(r"^ *(\d+)\. ", screen.getvalue(), re.MULTILINE)
    assert steps == [str(number) for number in range(1, len(steps) + 1)]
    assert len(re.findall(r"^ +\$ ", screen.getvalue(), re.MULTILINE)) == len(steps)
    assert re.fullmatch(r"SUCCESS in \d+ s\. \d+ files, .* equal .*", screen.getvalue().splitlines()[-1])


def test_it_notices_a_file_that_is_not_what_it_was(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    detach = demo.Demo._detach

    def detach_and_expect_something_else(self: demo.Demo, server: demo.Server) -> None:
        detach(self, server)
        self._sums.write_text(re.sub(r"^\w+(?=  charset.py$)", "0" * 64, self._sums.read_text(), flags=re.MULTILINE))

    monkeypatch.setattr(demo.Demo, "_detach", detach_and_expect_something_else)
    assert demo.run_here(demo.Narrator(Console(file=screen))) == 1
    assert re.search(r"^FAILED: .*\nended with exit code 1 and said:\ncharset.py: FAILED$", screen.getvalue(), FLAGS)
    assert ": OK" not in screen.getvalue()
    assert not list(Path("/sys/kernel/config/target/core").glob("user_*/*/wwn"))
