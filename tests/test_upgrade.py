"""A ring goes from one server to the next under load, on the simulator, which knows if a command is answered twice."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import ClassVar

import pytest
import trio

from tcmu_rs import BlockHandler, DeviceError, IoVec, _native
from tcmu_rs._runtime import Device
from tcmu_rs._service import serve_ring
from tcmu_rs._slot import Slot
from tcmu_rs._upgrade import Inherited, Succession
from tcmu_rs.testing import SimulatedDisk

SIZE = 1 << 20
MODE_SELECT_WCE_OFF = bytes.fromhex("151000001800"), bytes(4) + bytes.fromhex("0812") + bytes(18)


class Disk(BlockHandler):
    """Storage that outlives its handlers, and which only one of them may have open."""

    size = SIZE
    max_in_flight = 32
    locked: ClassVar[set[int]] = set()

    def __init__(self, storage: bytearray, stuck: trio.Event | None = None) -> None:
        self._storage = storage
        self._stuck = stuck

    async def open(self) -> None:
        assert id(self._storage) not in self.locked
        self.locked.add(id(self._storage))

    async def aclose(self) -> None:
        self.locked.discard(id(self._storage))

    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(memoryview(self._storage)[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: IoVec) -> None:
        # Suspended more often than not, so that there is always something in flight.
        await trio.sleep(random.choice((0, 0.001, 0.003)))
        if self._stuck is not None:
            await self._stuck.wait()
        iov.copy_into(memoryview(self._storage)[offset : offset + iov.nbytes])

    def flush(self) -> None:
        pass


class Line:
    """The servers of one ring, one after the other. A predecessor leaves as a process does: without a word."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.kernel = _native.Simulator()
        self.disk = SimulatedDisk(self.kernel, b"\x60" + bytes(15))
        self._storage = bytearray(SIZE)
        self._nursery = nursery

    async def _serve(self, handler: Disk, inherited: Inherited | None, task_status: trio.TaskStatus[Device]) -> None:
        with suppress(BaseExceptionGroup, DeviceError):
            await serve_ring(
                Slot(handler),
                memory=self.kernel.memory_fileno(),
                event=self.kernel.consumer_fileno(),
                map_size=self.kernel.size,
                name="disk",
                serial="1",
                naa=self.disk.naa,
                strict=True,
                begin=inherited.begin if inherited else None,
                task_status=task_status,
            )

    async def start(self, inherited: Inherited | None = None, stuck: trio.Event | None = None) -> None:
        handler = Disk(self._storage, stuck)
        await handler.open()
        self.disk.device = await self._nursery.start(self._serve, handler, inherited)

    async def succeed(self) -> None:
        """As `hand_over` and `Succession` do it, in one process."""
        before = self.disk.device
        await before.pause(5)
        await before.handler.aclose()
        record = {"device": "0/disk", **before.estate()}
        succession = Succession.__new__(Succession)
        succession.committed, succession._all_waiting, succession._left = trio.Event(), trio.Event(), 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.start, Inherited(succession, -1, record))
            await succession._all_waiting.wait()
            # Point of no return.
            before._ring.close()
            succession.committed.set()
        # A process would be gone; this one finds its ring dead.
        before.resume()


@pytest.mark.parametrize("seed", range(3))
async def test_each_command_is_answered_once_across_many_successions(seed: int) -> None:
    chance = random.Random(seed)
    done = 0

    async def load(blocks: range) -> None:
        nonlocal done
        wanted: dict[int, bytes] = {}
        while not stop:
            at = chance.choice(blocks) * 512
            wanted[at] = chance.randbytes(512)
            await line.disk.write(at, wanted[at])
            at = chance.choice(list(wanted))
            assert await line.disk.read(at, 512) == wanted[at]
            done += 1

    stop = False
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            line = Line(nursery)
            nursery.start_soon(line.disk._listen)
            await line.start()
            async with trio.open_nursery() as initiators:
                for number in range(16):
                    initiators.start_soon(load, range(number * 100, number * 100 + 100))
                for _ in range(8):
                    before = done
                    while done < before + 20:  # noqa: ASYNC110
                        await trio.sleep(chance.uniform(0, 0.01))
                    await line.succeed()
                stop = True
            assert not line.kernel.violations
            assert not line.kernel.broken
            assert line.kernel.outstanding == 0
            nursery.cancel_scope.cancel()


async def test_what_initiators_have_set_goes_along() -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            line = Line(nursery)
            nursery.start_soon(line.disk._listen)
            await line.start()
            assert dict(line.disk.device._ring.unit_state() or [])["write cache"] == 1
            reply = await line.disk.scsi(*MODE_SELECT_WCE_OFF)
            assert reply.status == 0, reply
            # START STOP UNIT: stopped.
            assert (await line.disk.scsi(bytes.fromhex("1b0000000000"))).status == 0
            await line.succeed()
            state = dict(line.disk.device._ring.unit_state() or [])
            assert (state["write cache"], state["stopped"]) == (0, 1)
            reply = await line.disk.scsi(bytes(6))
            assert reply.sense_code == (0x2, 0x04, 0x02)
            nursery.cancel_scope.cancel()


async def test_a_command_that_does_not_end_keeps_the_device_where_it_is() -> None:
    event = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            line = Line(nursery)
            nursery.start_soon(line.disk._listen)
            await line.start(stuck=event)
            nursery.start_soon(line.disk.write, 0, b"x" * 512)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.TooSlowError, match="disk: a command has not ended"):
                await line.disk.device.pause(0.05)
            event.set()
            assert await line.disk.read(0, 512) in (bytes(512), b"x" * 512)
            await line.disk.device.pause(5)
            line.disk.device.resume()
            assert await line.disk.read(0, 512) == b"x" * 512
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"position": 8}, "the ring stands at 0, not at 8"),
        ({"more": 1}, "the hand-over has more, which is unknown here"),
        ({"unit": [["what is that", 1]]}, "something unknown"),
        ({"unit": None}, "another kind"),
    ],
)
async def test_a_record_that_is_not_understood_is_refused(change: dict[str, object], what: str) -> None:
    succession = Succession.__new__(Succession)
    kernel = _native.Simulator()
    unit = _native.LogicalUnit(
        size=SIZE, block_size=512, vendor="v", product="p", revision="1", serial="1", naa=b"\x60" + bytes(15)
    )
    ring = _native.Ring(kernel.memory_fileno(), kernel.consumer_fileno(), kernel.size, unit)
    record = {"device": "0/disk", "position": 0, "unit": [], "kept": [], **change}
    with pytest.raises(ValueError, match=what):
        await Inherited(succession, -1, record).begin(ring, unit)
