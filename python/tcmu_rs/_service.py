"""How a device comes to be served: a handler, a ring of the kernel's or the simulator's, and what others may ask."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import trio

from . import _files, _lio, _native, _statistics
from ._domain import CopyDomain
from ._handler import BlockHandler, Handler, check, has
from ._runtime import GRACE, Device
from ._slot import Slot

if TYPE_CHECKING:
    from . import _control
    from ._adoption import Claim
    from ._sysfs import UioDevice
    from ._upgrade import Inherited

KERNEL_TIME_OUT = 30
"""Seconds after which the kernel gives a command up, unless told otherwise (`TCMU_TIME_OUT`)."""


def unit_for(handler: BlockHandler, *, serial: str, naa: bytes) -> _native.LogicalUnit:
    """Describes a block handler to the emulation; read-only and capabilities by what is there."""
    identity = handler.identity
    return _native.LogicalUnit(
        size=handler.size,
        block_size=handler.block_size,
        physical_block_size=handler.physical_block_size,
        rotational=handler.rotational,
        discard_granularity=handler.discard_granularity,
        writable=has(handler, "write") and not handler.read_only,
        flush=has(handler, "flush"),
        native_fua=handler.native_fua,
        discard=has(handler, "discard"),
        discard_zeroes=handler.discard_zeroes,
        write_zeroes=has(handler, "write_zeroes"),
        extents=has(handler, "extents"),
        max_atomic_write=handler.max_atomic_write,
        removable=handler.removable,
        vendor=identity.vendor,
        product=identity.product,
        revision=identity.revision,
        serial=identity.serial if identity.serial is not None else serial,
        naa=naa,
    )


async def serve_ring(
    handler: Handler | Slot,
    *,
    memory: int,
    event: int,
    map_size: int,
    name: str,
    serial: str,
    naa: bytes,
    strict: bool = False,
    grace: float = GRACE,
    deadline: float = math.inf,
    free_kept: Callable[[int], None] | None = None,
    before_stop: Callable[[], None] | None = None,
    begin: Callable[[_native.Ring, _native.LogicalUnit | None], Awaitable[None]] | None = None,
    copy_domain: CopyDomain | None = None,
    set_kernel_size: Callable[[int], None] | None = None,
    busy_poll: float = 0.0,
    task_status: trio.TaskStatus[Device] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves a handler that is open on a ring that is there: the kernel's or the simulator's.

    Args:
        handler: The open handler, or the slot that holds it. Closing what is there in the end is the caller's.
        memory: Descriptor to map. May be closed when the device has started.
        event: Descriptor of the doorbell, non-blocking. May be closed when the device has started.
        map_size: Bytes to map.
        name: For the log.
        serial: Unit serial number.
        naa: The 16 bytes of the NAA-6 designator.
        strict: Raise what a handler must not raise, instead of going on.
        grace: Seconds for commands in flight when the device stops.
        deadline: Seconds that a command may take: then it is cancelled, and answered as timed out.
        free_kept: Tells the kernel that a kept buffer is free.
        before_stop: Called in a thread when the device begins to stop, while commands in flight go on.
        begin: Called before the first command is taken, for what goes on from another process.
        copy_domain: The disks that initiators may copy from and to, beside this one itself.
        set_kernel_size: Called in a thread: tells the kernel the size of a device that was resized.
        busy_poll: Seconds that the device looks for the next command before it waits, at most (`_polling`).
        task_status: Gets the `Device` once commands flow.

    Resource handling: the ring is closed when this returns or raises; every command has been answered by then.

    Raises:
        DeviceError: The device went away, or its shared memory is corrupt.
        ValueError: There is a disk of the same name in the copy domain.
    """
    slot = handler if isinstance(handler, Slot) else Slot(handler)
    handler = slot.handler
    check(handler)
    unit = unit_for(handler, serial=serial, naa=naa) if isinstance(handler, BlockHandler) else None
    ring = _native.Ring(
        memory,
        event,
        map_size,
        unit,
        intercept=has(handler, "scsi_command"),
        fills_reads=getattr(handler, "fills_reads", False),
    )
    if begin is not None:
        try:
            await begin(ring, unit)
        except BaseException:
            ring.close()
            raise
    with _files.USER:
        device = Device(
            slot,
            ring,
            name,
            strict=strict,
            grace=grace,
            deadline=deadline,
            free_kept=free_kept,
            before_stop=before_stop,
            naa=naa,
            copy_domain=copy_domain,
            unit=unit,
            set_kernel_size=set_kernel_size,
            busy_poll=busy_poll,
        )
        if copy_domain is None or unit is None:
            await device.run(task_status)
            return
        try:
            copy_domain._join(device, unit)
        except BaseException:
            ring.close()
            raise
        try:
            await device.run(task_status)
        finally:
            copy_domain._leave(device, unit)


def verbs(devices: Callable[[], Iterable[Device]]) -> dict[str, _control.Verb]:
    """What other processes may ask of the server of some devices, over its control socket.

    `statistics`: the key `devices` of the answer has a record for each device, or, with a key `name` in the request,
    for that device alone, if it is served here.

    `snapshot`: does `action` with the state `snapshot` of the device `name`: `create` or `delete`.

    `resize`: changes the size of the device `name` to `size` bytes, to a smaller one if `shrink`. The answer has its
    `size` then, and that `before`.
    """

    async def statistics(request: _control.Message, channel: _control.Channel) -> dict[str, Any]:
        name = request.body.get("name")
        asked = [device for device in devices() if name in (None, device.name)]
        return {
            "devices": [
                {"name": device.name, "handler": type(device.handler).__name__}
                | _statistics.as_json(device.statistics())
                for device in asked
            ]
        }

    async def resize(request: _control.Message, channel: _control.Channel) -> dict[str, Any]:
        name, size, shrink = (request.body.get(key) for key in ("name", "size", "shrink"))
        device = next((device for device in devices() if device.name == name), None)
        if device is None or not isinstance(size, int):
            raise ValueError(f"device {name} is not served here, or {size!r} is no size")
        before = device.size
        # Who asks may go away: a change that has begun goes on.
        await device.resize(size, shrink=shrink is True)
        return {"size": device.size, "before": before}

    async def snapshot(request: _control.Message, channel: _control.Channel) -> dict[str, Any]:
        name, action, snapshot = (str(request.body.get(key)) for key in ("name", "action", "snapshot"))
        device = next((device for device in devices() if device.name == name), None)
        if device is None:
            raise ValueError(f"device {name} is not served here")
        await device.change_snapshots(action, snapshot)
        return {}

    return {"statistics": statistics, "resize": resize, "snapshot": snapshot}


def naa_of(serial: str) -> bytes:
    """The NAA-6 designator that LIO itself derives from a unit serial number (`spc_gen_naa_6h_vendor_specific`).

    Hexadecimal digits of the serial number behind the OUI 001405h, so that kernel and emulation name one disk alike.
    """
    digits = [digit for digit in serial if digit in "0123456789abcdefABCDEF"][:25]
    return bytes.fromhex("6001405" + "".join(digits).ljust(25, "0"))


def _action(uio: UioDevice, action: str, value: int) -> None:
    with open(f"/sys/kernel/config/target/core/user_{uio.hba}/{uio.name}/action/{action}", "w") as file:  # noqa: PTH123
        file.write(str(value))


def _deadline_of(uio: UioDevice) -> float:
    """Before the kernel's timer of the command: what it fails is not tried again, and what it aborts waits for us."""
    path = f"/sys/kernel/config/target/core/user_{uio.hba}/{uio.name}/attrib/cmd_time_out"
    try:
        with open(path) as file:  # noqa: PTH123
            seconds = int(file.read())
    except (OSError, ValueError):
        seconds = KERNEL_TIME_OUT
    return seconds * 5 / 6 if seconds > 0 else math.inf


async def serve_uio(
    handler: Handler | Slot,
    uio: UioDevice,
    *,
    name: str,
    wwn: str,
    claimed: Claim | None = None,
    inherited: Inherited | None = None,
    strict: bool = False,
    grace: float = GRACE,
    deadline: float | None = None,
    before_stop: Callable[[], None] | None = None,
    copy_domain: CopyDomain | None = None,
    busy_poll: float = 0.0,
    task_status: trio.TaskStatus[Device] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves an open handler on a device of this machine's kernel.

    Args:
        handler: As for `serve_ring`.
        uio: The device; nobody else may have it open.
        name: For the log.
        wwn: The backstore's unit serial number.
        claimed: The claim to the device, if it was there before. If nobody hands it over, it is blocked and its ring is
            empty (`_adoption.Claim.fence`), and it is unblocked when commands flow. The descriptor stays the caller's.
        inherited: What another process hands over with it.
        strict: As for `serve_ring`.
        grace: As for `serve_ring`.
        deadline: As for `serve_ring`; None for five sixths of the time after which the kernel gives a command up.
        before_stop: As for `serve_ring`.
        copy_domain: As for `serve_ring`.
        busy_poll: As for `serve_ring`.
        task_status: As for `serve_ring`.

    Raises:
        OSError: The device cannot be opened; EBUSY if another process serves it.
        DeviceError: The device went away, or its shared memory is corrupt.
    """
    if deadline is None:
        deadline = await trio.to_thread.run_sync(_deadline_of, uio)
    lent = claimed.fd if claimed is not None else None
    fd = os.open(uio.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) if lent is None else lent
    free_kept = functools.partial(_action, uio, "free_kept_buf")

    async def begin(ring: _native.Ring, unit: _native.LogicalUnit | None) -> None:
        if inherited is not None:
            await inherited.begin(ring, unit)
        if claimed is not None:
            size = (handler.handler if isinstance(handler, Slot) else handler).size
            await trio.to_thread.run_sync(claimed.settle, size, unit)

    try:

        async def serve(task_status: trio.TaskStatus[Device]) -> None:
            await serve_ring(
                handler,
                memory=fd,
                event=fd,
                map_size=uio.map_size,
                name=name,
                serial=wwn,
                naa=naa_of(wwn),
                strict=strict,
                grace=grace,
                deadline=deadline,
                free_kept=free_kept,
                before_stop=before_stop,
                begin=begin,
                copy_domain=copy_domain,
                set_kernel_size=functools.partial(_lio.set_size, _lio.Backstore(uio.name, uio.hba, wwn)),
                busy_poll=busy_poll,
                task_status=task_status,
            )

        if lent is None:
            await serve(task_status)
            return
        async with trio.open_nursery() as nursery:
            device = await nursery.start(serve)
            if inherited is None:
                await trio.to_thread.run_sync(_action, uio, "block_dev", 0)
            else:
                nursery.start_soon(inherited.free_kept, free_kept)
            task_status.started(device)
    finally:
        if lent is None:
            os.close(fd)
