"""The protocol of the qcow2 log loses nothing, and each of its rules is needed."""

from __future__ import annotations

import os

import pytest

from .qcow2_protocol import RULES, failures

# Where to look for what seldom happens.
RARE = {"zero the end": 8000}
TRIALS = int(os.environ.get("TCMU_TRIALS", "1000"))


def test_nothing_is_lost() -> None:
    assert failures(range(TRIALS)) == {}


@pytest.mark.parametrize("rule", RULES)
def test_without_this_rule_something_is(rule: str) -> None:
    first = RARE.get(rule, 0)
    assert failures(range(first, first + 20_000), [rule], enough=1)
