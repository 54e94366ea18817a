"""The users of sectors, beside a count of each by itself."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs.handlers.qcow2.space import Space

MIB = 1 << 20
# Around the border of two regions.
RANGES = st.tuples(st.integers(MIB - 8192, MIB + 4096), st.integers(1, 9000))


@given(st.lists(RANGES, max_size=12), st.data(), st.booleans())
def test_sectors_are_free_when_the_last_user_goes(
    ranges: list[tuple[int, int]], data: st.DataObject, looked_through: bool
) -> None:
    space = Space(cast("Any", None), 13, 0, packed=True)
    space.take_run(2 * MIB)
    seen = (0, 0)
    if looked_through:
        borders = data.draw(st.lists(st.integers(MIB // 8192 - 2, MIB // 8192 + 2), min_size=2, max_size=2))
        space._walked, space._unknown = seen = (min(borders) * 8192, max(borders) * 8192)
    count: dict[int, int] = {}
    for offset, length in ranges:
        space.use(offset, length)
        for sector in range(offset // 512, (offset + length - 1) // 512 + 1):
            count[sector] = count.get(sector, 0) + 1
    free: set[int] = set()
    for offset, length in data.draw(st.permutations(ranges)):
        space.free(offset, length)
        for sector in range(offset // 512, (offset + length - 1) // 512 + 1):
            count[sector] -= 1
            if not count[sector] and not seen[0] <= sector * 512 < seen[1]:
                free.add(sector)
        found = [sector for start, length in space.holes._lengths.items() for sector in range(start, start + length)]
        assert sorted(found) == sorted(free)
