"""The netlink layer against a real kernel: every announcement arrives, every answer reaches its writer."""

from __future__ import annotations

import errno
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from tcmu_rs._native import DeviceEvent, NetlinkSocket
from tcmu_rs._netlink import DeviceEvents, Rescan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORE = Path("/sys/kernel/config/target/core")
PARAMETERS = Path("/sys/module/target_core_user/parameters")
HBA = 4242
MANY = 200


def skip_where_something_is_missing() -> None:
    for piece, module in (CORE, "target_core_mod"), (PARAMETERS, "target_core_user"):
        if not piece.is_dir():
            pytest.skip(f"{piece} is missing: needs the kernel module {module}")
    if os.geteuid() != 0:
        pytest.skip("needs root")


def write(path: Path, value: bytes | str) -> None:
    """One operation of configfs is one write; nothing buffered, nothing written again."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(value))
    finally:
        os.close(fd)


class Backstore:
    def __init__(self, name: str, *, config: str = "testing/x", replies: bool = False) -> None:
        self.path = CORE / f"user_{HBA}" / name
        self.uio_name = f"tcm-user/{HBA}/{name}/{config}"
        self._control = f"dev_config={config},dev_size=1048576,cmd_ring_size_mb=1"
        if not replies:
            self._control += ",nl_reply_supported=-1"

    def prepare(self) -> None:
        self.path.mkdir()
        write(self.path / "control", self._control)

    def enable(self) -> None:
        write(self.path / "enable", "1")

    def create(self) -> None:
        self.prepare()
        self.enable()

    def set(self, attribute: str, value: bytes | str) -> None:
        write(self.path / "attrib" / attribute, value)

    def attribute(self, attribute: str) -> str:
        return (self.path / "attrib" / attribute).read_text().strip()

    def enabled(self) -> bool:
        return (self.path / "enable").read_text().strip() == "1"

    def device_id(self) -> int:
        return int((self.path / "statistics/scsi_dev/indx").read_text())

    def remove(self) -> None:
        self.path.rmdir()


def free_every_writer() -> None:
    """Whatever a failed test left waiting in the kernel comes back with an error."""
    write(PARAMETERS / "block_netlink", "1")
    write(PARAMETERS / "reset_netlink", "1")


@pytest.fixture(autouse=True)
def hba() -> Iterator[None]:
    skip_where_something_is_missing()
    path = CORE / f"user_{HBA}"
    path.mkdir()
    yield
    free_every_writer()
    try:
        for backstore in path.glob("*/"):
            backstore.rmdir()
        path.rmdir()
    finally:
        write(PARAMETERS / "block_netlink", "0")
        with_replies(on=False)


def with_replies(*, on: bool) -> None:
    netlink = NetlinkSocket()
    netlink.set_features(on)
    netlink.close()


@pytest.fixture
def replies() -> None:
    """Switched off again by `hba`."""
    with_replies(on=True)


async def in_thread(call: Callable[[], None], limiter: trio.CapacityLimiter | None = None) -> None:
    """Abandoned on a time-out, because a writer that waits in the kernel cannot be interrupted."""
    await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)


async def next_event(events: DeviceEvents) -> DeviceEvent:
    with trio.fail_after(30):
        event = await anext(events)
    assert isinstance(event, DeviceEvent)
    return event


async def collect(events: DeviceEvents, kind: str, *, answer: bool) -> list[str]:
    """The names of `MANY` events, each answered as it arrives."""
    names = []
    with trio.fail_after(300):
        async for event in events:
            assert isinstance(event, DeviceEvent), "overflow"
            assert event.kind == kind
            names.append(event.name)
            assert events.reply(event) is answer
            if len(names) == MANY:
                break
    return names


@pytest.mark.parametrize("answer", [False, True], ids=["replies off", "replies on"])
async def test_many_devices_at_once(answer: bool) -> None:
    """None is lost, none comes twice; with replies each writer waits for its own."""
    with_replies(on=answer)
    backstores = [Backstore(f"many{number}", replies=answer) for number in range(MANY)]
    expected = sorted(backstore.uio_name for backstore in backstores)
    limiter = trio.CapacityLimiter(MANY)
    with DeviceEvents() as events:
        for kind, step in ("added", Backstore.create), ("removed", Backstore.remove):
            async with trio.open_nursery() as nursery:
                for backstore in backstores:
                    nursery.start_soon(in_thread, partial(step, backstore), limiter)
                assert sorted(await collect(events, kind, answer=answer)) == expected
        await expect_silence(events)


async def test_many_devices_while_nobody_reads() -> None:
    """The buffer holds them."""
    backstores = [Backstore(f"many{number}") for number in range(MANY)]
    limiter = trio.CapacityLimiter(8)
    with DeviceEvents() as events:
        async with trio.open_nursery() as nursery:
            for backstore in backstores:
                nursery.start_soon(in_thread, backstore.create, limiter)
        names = await collect(events, "added", answer=False)
        assert sorted(names) == sorted(backstore.uio_name for backstore in backstores)


async def expect_silence(events: DeviceEvents) -> None:
    with trio.move_on_after(0.5):
        pytest.fail(f"unexpected: {await anext(events)}")


async def test_failure_of_added_reaches_the_writer(replies: None) -> None:
    backstore = Backstore("refused", replies=True)
    backstore.prepare()
    with DeviceEvents() as events:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def enable() -> None:
                with pytest.raises(OSError) as refused:
                    await in_thread(backstore.enable)
                assert refused.value.errno == errno.EMEDIUMTYPE

            event = await next_event(events)
            assert not backstore.enabled()
            assert events.reply(event, -errno.EMEDIUMTYPE)
        assert not backstore.enabled()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, backstore.enable)
            assert events.reply(await next_event(events))
        assert backstore.enabled()


async def test_an_event_is_answered_once(replies: None) -> None:
    """A second answer could meet the next event of the device, as a wrong type: the kernel would hang."""
    backstore = Backstore("once", replies=True)
    with DeviceEvents() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, backstore.create)
            event = await next_event(events)
            with pytest.raises(ValueError, match="status"):
                events.reply(event, 1)
            assert events.reply(event)
            with pytest.raises(ValueError, match="answered"):
                events.reply(event)


@pytest.mark.parametrize(
    ("attribute", "value", "field", "expected"),
    [
        ("dev_size", b"2097152", "size", 2097152),
        ("emulate_write_cache", b"1", "write_cache", 1),
        ("dev_config", b"testing/y,z \xff", "config", "testing/y,z \udcff"),
    ],
)
async def test_reconfiguration(
    replies: None, attribute: str, value: bytes, field: str, expected: int | str
) -> None:
    """Success stores the value; an error leaves it and reaches the writer. Names need not be UTF-8."""
    backstore = Backstore("reconfig", replies=True)
    with DeviceEvents() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, backstore.create)
            added = await next_event(events)
            assert events.reply(added)
        before = backstore.attribute(attribute)

        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def refused() -> None:
                with pytest.raises(OSError) as failure:
                    await in_thread(partial(backstore.set, attribute, value))
                assert failure.value.errno == errno.ENOSPC

            event = await next_event(events)
            assert (event.kind, event.name, event.device_id) == ("reconfig", added.name, added.device_id)
            assert {name: getattr(event, name) for name in ("config", "size", "write_cache")} == {
                "config": None,
                "size": None,
                "write_cache": None,
                field: expected,
            }
            assert events.reply(event, -errno.ENOSPC)
        assert backstore.attribute(attribute) == before

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, partial(backstore.set, attribute, value))
            assert events.reply(await next_event(events))
        stored = (backstore.path / "attrib" / attribute).read_bytes().rstrip(b"\n")
        assert stored == value

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, backstore.remove)
            removed = await next_event(events)
            renamed = f"tcm-user/{HBA}/reconfig/{expected}" if field == "config" else added.name
            assert (removed.kind, removed.name) == ("removed", renamed)
            # The kernel goes on removing, whatever the answer.
            assert events.reply(removed, -errno.EIO)


async def test_foreign_devices_wait_for_their_own_daemon(replies: None) -> None:
    """Both daemons hear everything. Ours leaves the other's device alone, which goes on waiting."""
    foreign = Backstore("foreign", config="other/x", replies=True)
    with DeviceEvents() as ours, DeviceEvents() as theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, foreign.create)
            heard = await next_event(ours)
            assert heard.name == foreign.uio_name
            await expect_silence(ours)
            assert not foreign.enabled()
            assert theirs.reply(await next_event(theirs))
        assert foreign.enabled()
        # Too late: nobody waits any more, and nothing breaks.
        assert not ours.reply(heard)


def shrink(events: DeviceEvents) -> None:
    """To the smallest receive buffer there is: a handful of events."""
    with socket.socket(fileno=os.dup(events._socket.fileno())) as netlink:
        netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)


async def test_overflow_is_told_after_the_events_that_arrived() -> None:
    with DeviceEvents() as events:
        shrink(events)
        for number in range(20):
            Backstore(f"overflow{number}").create()
        arrived = 0
        while isinstance(event := await anext(events), DeviceEvent):
            assert event.name == f"tcm-user/{HBA}/overflow{arrived}/testing/x"
            arrived += 1
        assert isinstance(event, Rescan)
        assert 0 < arrived < 20
        # Read to its end, the socket is as good as new.
        after = Backstore("after")
        after.create()
        assert (await next_event(events)).name == after.uio_name


async def test_writers_of_lost_events_are_found_by_a_scan(replies: None) -> None:
    backstores = {}
    for number in range(20):
        backstore = Backstore(f"lost{number}", replies=True)
        backstores[backstore.uio_name] = backstore
        backstore.prepare()
    limiter = trio.CapacityLimiter(len(backstores))
    with DeviceEvents() as events, trio.fail_after(60):
        shrink(events)
        async with trio.open_nursery() as nursery:
            for backstore in backstores.values():
                nursery.start_soon(in_thread, backstore.enable, limiter)
            # Nothing else tells that a writer has come as far as its event.
            while len(waiting := uio_devices()) < len(backstores):  # noqa: ASYNC110
                await trio.sleep(0.05)
            await trio.sleep(0.5)
            while isinstance(event := await anext(events), DeviceEvent):
                assert events.reply(event)
                del waiting[event.name]
            assert waiting
            for name, minor in waiting.items():
                backstore = backstores[name]
                assert not backstore.enabled()
                assert events.reply(DeviceEvent.added(name, minor, backstore.device_id()))
    assert all(backstore.enabled() for backstore in backstores.values())


def uio_devices() -> dict[str, int]:
    names = {}
    for uio in Path("/sys/class/uio").iterdir():
        name = (uio / "name").read_text().rstrip("\n")
        if name.startswith(f"tcm-user/{HBA}/"):
            names[name] = int(uio.name.removeprefix("uio"))
    return names


async def test_without_privileges_one_may_listen_only() -> None:
    os.seteuid(65534)
    try:
        events = DeviceEvents()
        with pytest.raises(PermissionError):
            events._socket.set_features(True)
    finally:
        os.seteuid(0)
    with events:
        backstore = Backstore("listen")
        backstore.create()
        assert (await next_event(events)).name == backstore.uio_name


async def test_closing_ends_the_iteration() -> None:
    with DeviceEvents() as events:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def listen() -> None:
                async for event in events:
                    pytest.fail(f"unexpected: {event}")

            await trio.testing.wait_all_tasks_blocked()
            events.close()
    events.close()
    with pytest.raises(OSError) as closed:
        events._socket.receive()
    assert closed.value.errno == errno.EBADF


async def test_unloading_the_module_ends_in_an_error() -> None:
    """The group dies with the module, and a new one is not joined by itself: silence would last for ever."""
    (CORE / f"user_{HBA}").rmdir()
    with DeviceEvents() as events:
        await trio.run_process(["modprobe", "-r", "target_core_user"])
        try:
            with trio.fail_after(10), pytest.raises(FileNotFoundError, match="target_core_user"):
                await anext(events)
            with pytest.raises(FileNotFoundError, match="target_core_user"):
                DeviceEvents()
        finally:
            await trio.run_process(["modprobe", "target_core_user"])
        with pytest.raises(FileNotFoundError, match="target_core_user"):
            events._socket.set_features(False)
    (CORE / f"user_{HBA}").mkdir()
    with DeviceEvents() as events:
        backstore = Backstore("reloaded")
        backstore.create()
        assert (await next_event(events)).name == backstore.uio_name


def test_receiving_nothing_does_not_wait() -> None:
    netlink = NetlinkSocket()
    started = time.monotonic()
    received = netlink.receive()
    assert time.monotonic() - started < 1
    assert (received.events, received.overflow, received.malformed) == ([], False, [])
    netlink.close()
