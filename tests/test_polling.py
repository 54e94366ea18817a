"""Busy polling: it finds commands before anybody is woken up, lets others run, and ends when it does not pay."""

from __future__ import annotations

import functools

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import _native
from tcmu_rs._polling import START, next_window
from tcmu_rs._runtime import Device
from tcmu_rs._service import naa_of, serve_ring
from tcmu_rs.testing import simulated

from .disks import BLOCK, GOOD, AsyncDisk, Gated, read16
from .test_cost import WakeUps

LIMIT = 200_000


@given(st.integers(0, LIMIT), st.integers(0, 10 * LIMIT))
def test_the_window_grows_while_that_can_pay_and_closes_when_it_cannot(window: int, waited: int) -> None:
    new = next_window(window, waited, LIMIT)
    assert 0 <= new <= LIMIT
    if waited <= window:
        assert new == window
    elif waited >= LIMIT:
        assert new == 0
    else:
        assert new > window


def test_the_window_gets_to_what_it_takes() -> None:
    window = 0
    for _ in range(10):
        window = next_window(window, 90_000, LIMIT)
    assert 90_000 <= window < LIMIT
    assert next_window(0, 1, LIMIT) == START


async def test_others_run_and_the_device_ends_while_it_looks() -> None:
    """A window that nothing closes, and commands from another thread: no task of the loop does the submitting."""
    kernel = _native.Simulator()
    serve = functools.partial(
        serve_ring,
        AsyncDisk(),
        memory=kernel.memory_fileno(),
        event=kernel.consumer_fileno(),
        map_size=kernel.size,
        name="polled",
        serial="polled",
        naa=naa_of("1"),
        strict=True,
        busy_poll=3600,
    )

    def initiate() -> None:
        for block in range(8):
            kernel.submit(read16(block), None, BLOCK)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            device: Device = await nursery.start(serve)
            assert device._engine._polling is not None
            device._engine._polling._window = 3600 * 10**9
            await trio.to_thread.run_sync(initiate)
            while device.statistics().commands < 8 or device.statistics().in_flight:
                await trio.lowlevel.checkpoint()
            await trio.sleep(0.01)
            device.stop()
    assert [status for _, status, *_ in kernel.process()] == [GOOD] * 8
    assert not kernel.violations


async def test_handlers_that_wait_have_the_loop() -> None:
    handler = Gated(2)
    instrument = WakeUps()
    async with simulated(handler, busy_poll=3600) as disk:
        assert disk.device._engine._polling is not None
        disk.device._engine._polling._window = 3600 * 10**9
        ticket = disk.submit(read16(0), data_in=BLOCK)
        with trio.fail_after(30):
            await handler_entered(handler)
        trio.lowlevel.add_instrument(instrument)
        await trio.sleep(0.1)
        trio.lowlevel.remove_instrument(instrument)
        # Nobody looks at the ring while a command waits.
        assert instrument.count <= 5
        handler.open_gate(0)
        assert (await disk.wait(ticket)).status == GOOD


async def handler_entered(handler: Gated) -> None:
    while not handler.entered:
        await trio.lowlevel.checkpoint()
    for _ in range(5):
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("busy_poll", [0.0, 0.0002])
async def test_an_idle_device_sleeps(busy_poll: float) -> None:
    instrument = WakeUps()
    async with simulated(AsyncDisk(), busy_poll=busy_poll) as disk:
        for _ in range(20):
            await disk.read(0, BLOCK)
        await trio.sleep(0.05)
        trio.lowlevel.add_instrument(instrument)
        await trio.sleep(0.2)
        trio.lowlevel.remove_instrument(instrument)
    assert instrument.count <= 5
