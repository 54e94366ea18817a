"""The programs in the README are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tcmu_rs
import tcmu_rs.testing
from bench.report import TUNING, claims, inserted

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def smallest_handler() -> type[tcmu_rs.BlockHandler]:
    namespace: dict[str, Any] = {}
    exec(BLOCKS[0].replace("trio.run(main)\n", ""), namespace)
    handler: type[tcmu_rs.BlockHandler] = namespace["RamDisk"]
    return handler


def test_smallest_handler_has_no_more_than_24_lines() -> None:
    assert len(BLOCKS[0].splitlines()) <= 24


async def test_smallest_handler_is_a_disk() -> None:
    async with tcmu_rs.testing.simulated(smallest_handler()(1 << 20)) as disk:  # type: ignore[call-arg]
        await disk.write(512, b"a" * 1024)
        assert await disk.read(0, 2048) == bytes(512) + b"a" * 1024 + bytes(512)


async def test_test_of_the_readme_passes() -> None:
    namespace: dict[str, Any] = {"tcmu_rs": tcmu_rs, "RamDisk": smallest_handler()}
    exec(BLOCKS[1], namespace)
    await namespace["test_round_trip"]()


@pytest.mark.parametrize("module", ["bench.native", "bench.lab", "bench.simulator", "bench.micro"])
def test_benchmarks_find_where_their_claims_go(module: str) -> None:
    once = inserted(README, module, claims(["fast " * 40, "and slow"]))
    assert once.count("- and slow\n") == 1
    assert all(len(line) <= 120 for line in once.splitlines() if "fast" in line)
    assert inserted(once, module, claims(["fast"])) == inserted(README, module, claims(["fast"]))


def test_a_page_without_the_marks_of_a_benchmark_is_refused() -> None:
    assert "measured" in inserted(TUNING.read_text(), "bench.lab --tunables", "measured")
    with pytest.raises(ValueError, match=r"no <!-- bench\.lab --> and <!-- end of bench\.lab -->"):
        inserted("# Nothing\n", "bench.lab", "fast")
