"""The shipped handlers, and deliberately broken ones, against the model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tcmu_rs import BlockHandler, IoVec
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing.model import BlockMachine

from .conftest import Log
from .disks import AsyncDisk, PlainDisk

SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# What is found in the broken ones is known: it need not be made small.
BROKEN = settings(SETTINGS, phases=[Phase.generate], report_multiple_bugs=False, max_examples=100)


class RamMachine(BlockMachine):
    def make_handler(self) -> BlockHandler:
        return RamHandler(200 * 512)


class TinyRingMachine(RamMachine):
    options: ClassVar[dict[str, int]] = {"ring_size": 4096, "data_size": 32 * 4096, "capabilities": 4}


class GranularDisk(AsyncDisk):
    discard_granularity = 4096

    async def discard(self, offset: int, length: int) -> None:
        assert offset % 4096 == 0
        self.data[offset : offset + length] = b"?" * length


class GranularMachine(BlockMachine):
    def make_handler(self) -> BlockHandler:
        return GranularDisk(101 * 512)


class FileMachine(BlockMachine):
    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())

    def make_handler(self) -> BlockHandler:
        return FileHandler(self.directory / "disk", size=64 * 4096, create=True, block_size=4096)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.directory)


@pytest.mark.parametrize("machine", [RamMachine, TinyRingMachine, GranularMachine, FileMachine])
def test_handlers_are_like_the_model(machine: type[BlockMachine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


class LosesTheTail(PlainDisk):
    """Long writes lose their last block."""

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov.slice(0, iov.nbytes - 512 if iov.nbytes > 4096 else iov.nbytes))


class DiscardsNothing(PlainDisk):
    discard_zeroes = True

    def discard(self, offset: int, length: int) -> None: ...


class SwapsUnderLoad(AsyncDisk):
    running = 0

    async def write(self, offset: int, iov: IoVec) -> None:
        self.running += 1
        try:
            await super().write(offset if self.running < 3 else 0, iov)
        finally:
            self.running -= 1


class Crashes(PlainDisk):
    def flush(self) -> None:
        raise KeyError("a bug")


@pytest.mark.parametrize("disk_class", [LosesTheTail, DiscardsNothing, SwapsUnderLoad])
def test_wrong_bytes_are_found(disk_class: type[PlainDisk]) -> None:
    class Machine(BlockMachine):
        def make_handler(self) -> BlockHandler:
            return disk_class(64 * 512)

    with pytest.raises(AssertionError, match="instead of"):
        run_state_machine_as_test(Machine, settings=BROKEN)


def test_a_device_that_dies_does_not_hang_the_test(log: Log) -> None:
    class Machine(BlockMachine):
        def make_handler(self) -> BlockHandler:
            return Crashes(64 * 512)

    with pytest.raises(BaseExceptionGroup):
        run_state_machine_as_test(Machine, settings=BROKEN)
    log.records.clear()
