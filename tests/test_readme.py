"""The programs in the README are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tcmu_rs
import tcmu_rs.testing

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
