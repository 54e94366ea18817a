"""Another handler for a device in service: what waits, what is refused, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.testing import CAP_OOOC, CAP_READ_LEN, CAP_TMR, LUN_RESET, SimulatedDisk, simulated

from .conftest import Log
from .disks import (
    BLOCK,
    BUSY,
    CHECK_CONDITION,
    GOOD,
    TASK_ABORTED,
    TEST_UNIT_READY,
    AsyncDisk,
    BlockingDisk,
    Gated,
    PlainDisk,
    Storage,
    read16,
    write16,
)


class Logged(AsyncDisk):
    """Notes what happens to it, in a list that is shared."""

    def __init__(self, name: str, events: list[str], data: bytearray | None = None) -> None:
        super().__init__()
        self.name = name
        self.events = events
        if data is not None:
            self.data = data
        self.failure: BaseException | None = None
        self.gate = trio.Event()
        self.gate.set()

    async def open(self) -> None:
        await self.gate.wait()
        self.events.append(f"{self.name} opens")
        if self.failure is not None:
            raise self.failure

    async def aclose(self) -> None:
        self.events.append(f"{self.name} closes")

    async def flush(self) -> None:
        self.events.append(f"{self.name} flushes")


async def test_the_new_handler_serves_after_the_old_one_is_flushed_and_closed() -> None:
    events: list[str] = []
    old = Logged("old", events)
    new = Logged("new", events, old.data)
    async with simulated(old) as disk:
        await disk.write(0, b"a" * BLOCK)
        await disk.device.replace(new)
        assert disk.device.handler is new
        assert await disk.read(0, BLOCK) == b"a" * BLOCK
        await disk.write(BLOCK, b"b" * BLOCK)
    assert events == ["old opens", "old flushes", "old closes", "new opens", "new closes"]
    assert new.data[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK


@pytest.mark.parametrize("old_class", [PlainDisk, AsyncDisk, BlockingDisk])
@pytest.mark.parametrize("new_class", [PlainDisk, AsyncDisk, BlockingDisk])
async def test_colours_and_depths_change_under_load(old_class: type[Storage], new_class: type[Storage]) -> None:
    size = 64 * BLOCK
    handlers = [kind(size) for kind in (old_class, new_class, old_class)]
    for handler in handlers[1:]:
        handler.data = handlers[0].data
    finished = 0

    async def work(disk: SimulatedDisk, block: int) -> None:
        nonlocal finished
        for turn in range(40):
            data = bytes([turn, block]) * (BLOCK // 2)
            await disk.write(block * BLOCK, data)
            assert await disk.read(block * BLOCK, BLOCK) == data
        finished += 1

    async with simulated(handlers[0]) as disk, trio.open_nursery() as nursery:
        for block in range(32):
            nursery.start_soon(work, disk, block)
        for handler in handlers[1:]:
            await trio.lowlevel.checkpoint()
            await disk.device.replace(handler)
        assert finished < 32
    assert finished == 32
    assert disk.device.statistics().commands == 2 * 32 * 40


async def test_what_has_begun_ends_with_the_old_one_and_what_comes_waits_for_the_new_one() -> None:
    old, new = Gated(2), Gated(2)
    new.data[:BLOCK] = b"n" * BLOCK
    async with simulated(old) as disk, trio.open_nursery() as nursery:
        begun = [disk.submit(read16(block), data_in=BLOCK) for block in range(4)]
        await wait_all_tasks_blocked()
        nursery.start_soon(disk.device.replace, new)
        await wait_all_tasks_blocked()
        late = disk.submit(read16(0), data_in=BLOCK)
        emulated = disk.submit(TEST_UNIT_READY)
        await wait_all_tasks_blocked()
        assert old.entered == [0, 1]
        old.open_gate(0, 1, 2, 3)
        new.open_gate(0)
        assert [(await disk.wait(ticket)).data for ticket in begun] == [bytes(BLOCK)] * 4
        assert (await disk.wait(late)).data == b"n" * BLOCK
        assert (await disk.wait(emulated)).status == GOOD
    assert (old.entered, new.entered) == ([0, 1, 2, 3], [0])


async def test_a_promise_of_the_handler_before_does_not_hold_for_the_next_one() -> None:
    """A parked read kept the promise to fill its memory, and showed what was there before."""

    class Promising(Gated):
        fills_reads = True

    class Partial(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            iov[0][:4] = b"part"

    old = Promising()
    async with simulated(old) as disk, trio.open_nursery() as nursery:
        begun = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        nursery.start_soon(disk.device.replace, Partial())
        await wait_all_tasks_blocked()
        parked = disk.submit(read16(1), data_in=BLOCK)
        await wait_all_tasks_blocked()
        old.open_gate(0)
        assert (await disk.wait(begun)).status == GOOD
        assert (await disk.wait(parked)).data == b"part" + bytes(BLOCK - 4)


async def test_task_management_is_heard_while_commands_are_parked() -> None:
    old, new = Gated(1), Gated(1)
    async with simulated(old) as disk, trio.open_nursery() as nursery:
        hung = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        nursery.start_soon(disk.device.replace, new)
        await wait_all_tasks_blocked()
        parked = [disk.submit(read16(block), data_in=BLOCK) for block in (1, 2)]
        await wait_all_tasks_blocked()
        disk.abort(parked[0])
        assert (await disk.wait(parked[0])).status == TASK_ABORTED
        # The reset ends what the replacement waits for, too.
        disk.abort(hung, parked[1], kind=LUN_RESET)
        assert (await disk.wait(hung)).status == TASK_ABORTED
        assert (await disk.wait(parked[1])).status == TASK_ABORTED
        await wait_all_tasks_blocked()
        assert disk.device.handler is new
        new.open_gate(3)
        assert (await disk.scsi(read16(3), data_in=BLOCK)).status == GOOD
    assert new.entered == [3]


async def test_a_command_that_does_not_end_keeps_the_old_handler(autojump_clock: MockClock) -> None:
    events: list[str] = []
    old, new = Gated(2), Logged("new", events)
    async with simulated(old) as disk:
        hung = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.TooSlowError):
            await disk.device.replace(new, within=5)
        assert disk.device.handler is old
        assert events == []
        old.open_gate(0, 1)
        assert (await disk.wait(hung)).status == GOOD
        assert (await disk.scsi(read16(1), data_in=BLOCK)).status == GOOD


async def test_parked_commands_have_their_deadline_too(autojump_clock: MockClock, log: Log) -> None:
    events: list[str] = []
    old, new = Logged("old", events), Logged("new", events)
    new.gate = trio.Event()
    async with simulated(old, deadline=20) as disk, trio.open_nursery() as nursery:

        async def replace() -> None:
            with pytest.raises(trio.TooSlowError):
                await disk.device.replace(new, within=60)

        nursery.start_soon(replace)
        await wait_all_tasks_blocked()
        parked = disk.submit(read16(0), data_in=BLOCK)
        assert (await disk.wait(parked)).status == BUSY
        assert trio.current_time() <= 21
    log.expect("1 commands had no turn within 20 s")
    assert events == ["old opens", "old flushes", "old closes", "old opens", "old closes"]


async def test_a_new_handler_that_does_not_open_leaves_the_old_one_in_its_place() -> None:
    events: list[str] = []
    old, new = Logged("old", events), Logged("new", events)
    new.failure = OSError(2, "No such file")
    async with simulated(old) as disk:
        written = disk.submit(write16(0), b"x" * BLOCK)
        with pytest.raises(OSError, match="No such file"):
            await disk.device.replace(new)
        assert (await disk.wait(written)).status == GOOD
        assert await disk.read(0, BLOCK) == b"x" * BLOCK
    assert events == ["old opens", "old flushes", "old closes", "new opens", "old opens", "old closes"]


async def test_a_new_handler_that_breaks_in_any_way_does_not_end_the_device() -> None:
    for failure in (RuntimeError("no idea"), KeyError("config"), trio.TooSlowError()):
        events: list[str] = []
        old, new = Logged("old", events), Logged("new", events)
        new.failure = failure
        async with simulated(old) as disk:
            with pytest.raises(type(failure)):
                await disk.device.replace(new)
            await disk.write(0, bytes(BLOCK))


async def test_when_neither_opens_the_device_ends() -> None:
    """What waited is told to come again, and nothing is asked of a handler that is closed."""
    events: list[str] = []
    old, new = Logged("old", events), Logged("new", events)
    new.failure = OSError(2, "No such file")
    new.gate = trio.Event()
    with pytest.raises(ExceptionGroup) as caught:
        async with simulated(old) as disk:
            old.failure = OSError(5, "Input/output error")

            async def replace() -> None:
                with pytest.raises(RuntimeError, match=r"No such file.*nor did Logged again.*Input/output"):
                    await disk.device.replace(new)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(replace)
                await wait_all_tasks_blocked()
                parked = [disk.submit(write16(block), bytes(BLOCK)) for block in range(8)]
                await wait_all_tasks_blocked()
                new.gate.set()
                assert {(await disk.wait(ticket)).status for ticket in parked} == {BUSY}
            waiting = disk.submit(read16(0), data_in=BLOCK)
            assert (await disk.wait(waiting)).status == BUSY
    assert caught.group_contains(RuntimeError, match="nor did Logged again")
    # Neither is open: neither is closed once more.
    assert events == ["old opens", "old flushes", "old closes", "new opens", "old opens"]


class WithFlush(PlainDisk):
    def flush(self) -> None:
        pass


class NativeFua(PlainDisk):
    native_fua = True

    def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        self.store(offset, iov)


class ReadOnly(PlainDisk):
    read_only = True


class Zeroing(PlainDisk):
    discard_zeroes = True

    def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)


class Atomic(PlainDisk):
    max_atomic_write = 4096


class Raw(tcmu_rs.Handler):
    size = 1 << 20

    async def command(self, cmd: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (PlainDisk(), PlainDisk(1 << 21), "PlainDisk.size is 2097152; initiators know 1048576"),
        (WithFlush(), PlainDisk(), r"PlainDisk has no flush\(\), which initiators were told of"),
        (
            PlainDisk(),
            WithFlush(),
            r"WithFlush has a write cache \(flush\), and initiators were told that there is none",
        ),
        (NativeFua(), PlainDisk(), "PlainDisk.native_fua is False; initiators rely on True"),
        (PlainDisk(), ReadOnly(), r"ReadOnly has no write\(\)"),
        (Zeroing(), PlainDisk(), r"PlainDisk has no discard\(\)"),
        (Atomic(), PlainDisk(), "PlainDisk.max_atomic_write is 0; initiators rely on 4096"),
        (PlainDisk(), Raw(), "Raw is no BlockHandler"),
        (Raw(), PlainDisk(), "PlainDisk is a BlockHandler"),
    ],
)
async def test_what_initiators_rely_on_cannot_go(old: tcmu_rs.Handler, new: tcmu_rs.Handler, text: str) -> None:
    async with simulated(old) as disk:
        with pytest.raises((TypeError, ValueError), match=text):
            await disk.device.replace(new)
        assert disk.device.handler is old
        assert (await disk.scsi(TEST_UNIT_READY)).status == GOOD


async def test_stale_memory_does_not_leak_when_the_promise_to_fill_reads_goes(log: Log) -> None:
    class Fills(PlainDisk):
        fills_reads = True

    class Forgets(PlainDisk):
        def read(self, offset: int, iov: IoVec) -> None:
            memoryview(iov[0])[:10] = b"0123456789"

    async with simulated(Fills()) as disk:
        await disk.write(0, b"secret.." * (BLOCK // 8))
        await disk.device.replace(Forgets())
        assert await disk.read(0, BLOCK) == b"0123456789".ljust(BLOCK, b"\0")


async def test_an_answer_that_waits_for_a_view_holds_a_replacement_up_until_that_is_gone(
    autojump_clock: MockClock, log: Log
) -> None:
    kept: list[memoryview] = []

    class Keeper(PlainDisk):
        def read(self, offset: int, iov: IoVec) -> None:
            kept.append(iov[0])
            super().read(offset, iov)

    async with simulated(Keeper(), capabilities=CAP_OOOC | CAP_READ_LEN | CAP_TMR) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        log.expect("kept 1 views")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.device.replace, PlainDisk())
            await wait_all_tasks_blocked()
            kept.clear()
        assert (await disk.wait(ticket)).status == GOOD


async def test_a_durable_write_stays_durable_when_the_new_handler_could_do_it_natively() -> None:
    calls: list[str] = []

    class Flushes(PlainDisk):
        def flush(self) -> None:
            calls.append("flush")

    class Native(NativeFua):
        def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
            calls.append(f"write, fua {fua}")

        def flush(self) -> None:
            calls.append("flush")

    async with simulated(Flushes()) as disk:
        await disk.device.replace(Native())
        calls.clear()
        await disk.write(0, bytes(BLOCK), fua=True)
    assert calls == ["write, fua False", "flush"]


async def test_a_handler_that_looks_at_every_command_can_come_and_go() -> None:
    class Nosy(PlainDisk):
        seen = 0

        def scsi_command(self, cmd: tcmu_rs.Command) -> Any:
            self.seen += 1
            return NotImplemented

    nosy = Nosy()
    async with simulated(PlainDisk()) as disk, trio.open_nursery() as nursery:
        await disk.write(0, bytes(BLOCK))
        await disk.device.replace(nosy)
        await disk.write(0, b"n" * BLOCK)
        assert nosy.seen == 1
        nursery.start_soon(disk.device.replace, PlainDisk())
        await disk.scsi(TEST_UNIT_READY)
        assert await disk.read(BLOCK, BLOCK) == bytes(BLOCK)


async def test_one_replacement_at_a_time(autojump_clock: MockClock) -> None:
    old = Gated(1)
    async with simulated(old) as disk, trio.open_nursery() as nursery:
        hung = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        nursery.start_soon(disk.device.replace, Gated(1))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="another change"):
            await disk.device.replace(Gated(1))
        with pytest.raises(ValueError, match="itself"):
            await disk.device.replace(old)
        old.open_gate(0)
        await disk.wait(hung)


async def test_a_cancelled_replacement_leaves_the_old_handler() -> None:
    old = Gated(1)
    async with simulated(old) as disk:
        hung = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.device.replace, Gated(1))
            await wait_all_tasks_blocked()
            parked = disk.submit(read16(1), data_in=BLOCK)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert disk.device.handler is old
        old.open_gate(0, 1)
        assert (await disk.wait(hung)).status == GOOD
        assert (await disk.wait(parked)).status == GOOD


async def test_a_device_that_stops_meanwhile_closes_its_handler_once(autojump_clock: MockClock) -> None:
    events: list[str] = []
    old = Logged("old", events)
    new = Logged("new", events)
    new.gate = trio.Event()
    async with simulated(old, grace=1) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(disk.device.replace, new)
        await wait_all_tasks_blocked()
        waiting = disk.submit(write16(0), bytes(BLOCK))
        disk.device.stop()
        await trio.sleep(5)
        assert "new opens" not in events
        new.gate.set()
        assert (await disk.wait(waiting)).status == BUSY
    assert events == ["old opens", "old flushes", "old closes", "new opens", "new closes"]


async def test_the_same_file_can_change_hands(tmp_path: Path) -> None:
    """The lock of the old handler is gone before the new one wants it."""
    path = tmp_path / "disk"
    options = tcmu_rs.Options(size=1 << 20, create=True)
    async with simulated(FileHandler.from_config(str(path), options)) as disk:
        await disk.write(4096, b"d" * 4096)
        await disk.device.replace(FileHandler.from_config(str(path), tcmu_rs.Options()))
        assert await disk.read(4096, 4096) == b"d" * 4096
        await disk.write(0, b"e" * 4096)
    assert path.read_bytes()[:8192] == b"e" * 4096 + b"d" * 4096


async def test_errors_are_the_new_handlers(log: Log) -> None:
    class Bad(PlainDisk):
        def read(self, offset: int, iov: IoVec) -> None:
            raise tcmu_rs.MediumError("new and bad")

    async with simulated(PlainDisk()) as disk:
        await disk.device.replace(Bad())
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == CHECK_CONDITION
    assert "Bad.read()" in log.expect("new and bad")
