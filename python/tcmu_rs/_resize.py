"""How people change the size of a disk: the server is asked, or, if there is none, the storage is changed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import trio

from . import _control, _devices, _lio

if TYPE_CHECKING:
    from ._devices import Device
    from ._handler import BlockHandler, Options


class ResizeError(_lio.LioError):
    """The size is as it was. The text says why."""


def find(handler: str, config: str) -> Device | None:
    """The device of this machine that has its storage in `handler:config`, or None."""
    # Behind the configuration there may be options, when others have made the device.
    return next(
        (
            device
            for device in _devices.devices()
            if device.handler == handler and (device.config == config or device.config.startswith(f"{config};"))
        ),
        None,
    )


def served(device: Device, size: int, *, shrink: bool) -> None:
    """Has the server of a device change its size, and disks of this machine take notice.

    Raises:
        ResizeError: Nobody serves it, or the server refuses.
    """
    check_served(device)
    trio.run(functools.partial(ask, device, "resize", size=size, shrink=shrink))
    if (backstore := _lio.find_backstore(device.name)) is not None:
        _lio.rescan(backstore)


def check_served(device: Device) -> None:
    """Refuses a device without a server: behind the back of one that comes back the storage must not change.

    Raises:
        ResizeError: Nobody serves it.
    """
    if device.pid is None:
        raise ResizeError(
            f"device {device.name} is there, and nobody serves it", f"attach it, or: tcmu-rs detach {device.name}"
        )


async def ask(device: Device, verb: str, **arguments: Any) -> None:
    """Has the server of a device do something with it.

    Raises:
        ResizeError: It does not.
    """
    assert device.pid is not None
    why = f"process {device.pid} has no control socket"
    for path in _control.sockets(device.pid):
        try:
            async with _control.connect(path) as channel:
                await channel.ask(verb, name=device.name, **arguments)
                return
        except _control.ControlError as error:
            why = str(error).partition(": ")[2] or str(error)
            # Each of its sockets stands for some of its devices.
            if "no verb" not in str(error) and "is not served here" not in str(error):
                break
    raise ResizeError(f"device {device.name}: {why}")


async def unserved(kind: type[BlockHandler], config: str, options: Options, size: int, *, shrink: bool) -> None:
    """Changes the storage of a disk, by the handler's class method `resize` if it has one, or its `set_size`.

    Raises:
        ValueError: The handler cannot do it, or it would become smaller without `shrink`.
    """
    # Imported here: what is above must work without the native module.
    from ._layers import Lower

    if (method := getattr(kind, "resize", None)) is not None:
        await method(config, options, size=size, shrink=shrink)
        return
    if not hasattr(kind, "set_size"):
        raise ValueError(f"{kind.__name__} has no resize")
    async with Lower(kind.from_config(config, options)) as lower:
        if size % lower.block_size:
            raise ValueError(f"{size} bytes are not whole blocks of {lower.block_size}")
        if size < lower.size and not shrink:
            raise ValueError(f"{size} bytes are less than the {lower.size} of now: what is behind is lost (--shrink)")
        await lower.set_size(size)
