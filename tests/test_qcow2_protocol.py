"""The protocol of the qcow2 log loses nothing, and each of its rules is needed."""

from __future__ import annotations

import os

import pytest

from .qcow2_protocol import RULES, failures

TRIALS = int(os.environ.get("TCMU_TRIALS", "1000"))


def test_nothing_is_lost() -> None:
    assert failures(range(TRIALS)) == {}


@pytest.mark.parametrize("rule", RULES)
def test_without_this_rule_something_is(rule: str) -> None:
    assert failures(range(20_000), [rule], enough=1)
