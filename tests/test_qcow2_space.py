"""The users of sectors, beside a count of each by itself."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs.handlers.qcow2.space import Space

MIB = 1 << 20


class File:
    """One that has all its blocks."""

    allocated = size = 0


FILE = cast("Any", File())
# Around the border of two regions.
RANGES = st.tuples(st.integers(MIB - 8192, MIB + 4096), st.integers(1, 9000))


@given(st.lists(RANGES, max_size=12), st.data(), st.booleans())
def test_sectors_are_free_when_the_last_user_goes(
    ranges: list[tuple[int, int]], data: st.DataObject, looked_through: bool
) -> None:
    space = Space(FILE, 13, 0, packed=True)
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


def test_nothing_is_known_of_a_region_that_had_something_in_it_before() -> None:
    # Of large images only the first half of what can be remembered is looked through for sectors. When one grew in the
    # middle of a region, that one was remembered from then on: what had been there before was nobody's.
    end = 5 << 30 | 8192 * 3
    space = Space(FILE, 13, end, packed=True)
    space.begin_scan()
    shared = end - 8192
    # One table is counted, then the image grows, then another.
    space.use(shared, 1000)
    space.use(space.take_run(5000), 5000)
    space.use(shared + 1000, 1000)
    for cluster in range(end - 3 * 8192, end, 8192):
        space.walk(cluster, used=True)
    space.end_scan()
    # A region that begins behind the end is new as a whole.
    space.use(space.take_run(2 * MIB), 2 * MIB)
    assert not [sector for sector in is_free(space) if sector * 512 < end]
    assert not space.knows(end)
    assert space.knows(end + MIB)
    first = next(sector for sector in range(end // 512, (end + MIB) // 512) if space.knows(sector * 512))
    assert first * 512 % MIB == 0
    for start in range(end - 2 * 8192, end + MIB, 1024):
        space.free(start, 512)
    for units in space.sparse_units():
        space.set_aside(units)
        space.put_back()
    assert not [sector for sector in is_free(space) if sector < first]


def test_what_a_record_on_its_way_frees_is_not_found_free_before() -> None:
    # A cluster of 2 MiB whose last frame was discarded while the image was looked through: its refcount was 0 already,
    # so all of it was free at once, and once more when the record was durable. Two clusters got the same place.
    space = Space(FILE, 21, 4 * MIB, packed=True)
    space.begin_scan()
    space.use(2 * MIB, 1000)
    for cluster in (0, 2 * MIB):
        space.walk(cluster, used=cluster == 0)
    space.end_scan()
    assert is_free(space) == [*range(4098, 8192)]
    space.free(2 * MIB, 1000)
    assert is_free(space) == [*range(4096, 8192)]


UNIT = 128


def is_free(space: Space) -> list[int]:
    """Sectors in holes, each as often as it is in one."""
    return sorted(sector for start, length in space.holes.all() for sector in range(start, start + length))


def test_a_unit_that_was_sparse_and_is_free_now_is_free_once() -> None:
    # Compaction chose a unit, a flush freed the rest of it and of its neighbours, and only then it was set aside. When
    # it was put back its sectors were in two holes, so two clusters got the same place: the one that came first was
    # lost.
    space = Space(FILE, 13, 0, packed=True)
    space.use(space.take_run(MIB), MIB)
    for sector in range(5 * UNIT, 6 * UNIT, 4):
        space.free(sector * 512, 512)
    (chosen,) = space.sparse_units()
    assert chosen == {5}
    for sector in range(4 * UNIT + 100, 6 * UNIT + 20):
        if not 5 * UNIT <= sector < 6 * UNIT or sector % 4:
            space.free(sector * 512, 512)
    space.set_aside(chosen)
    space.put_back()
    assert is_free(space) == [*range(4 * UNIT + 100, 6 * UNIT + 20)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_set_aside_and_put_back_is_free_once(seed: int) -> None:
    random = Random(seed)
    space = Space(FILE, 13, 0, packed=True)
    size = MIB // 512
    space.take_run(MIB)
    used = set(range(size))
    for sector in used:
        space.use(sector * 512, 512)

    def work() -> None:
        """Frees short and long runs, and takes some."""
        for _ in range(random.randrange(30)):
            start = random.randrange(size)
            for sector in range(start, min(size, start + random.choice([1, 2, 4, 64, 300]))):
                if sector in used and random.random() < 0.95:
                    used.remove(sector)
                    space.free(sector * 512, 512)
            length = random.choice([1, 3, 17])
            at = space.take_sectors(length * 512)
            if at is not None:
                space.use(at, length * 512)
                for sector in range(at // 512, at // 512 + length):
                    assert sector not in used
                    assert sector // UNIT not in aside
                    used.add(sector)

    aside: set[int] = set()
    for _ in range(2):
        work()
        chosen: set[int] = set()
        for units in space.sparse_units():
            chosen |= units
            if seed % 2:
                work()
        aside = space.set_aside(chosen)
        assert not {sector // UNIT for sector in is_free(space)} & aside
        work()
        aside = set()
        space.put_back()
        assert is_free(space) == sorted(set(range(size)) - used)
