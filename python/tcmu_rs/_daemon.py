"""Serves the devices that other programs make: the successor's side of `targetcli`.

A device is ours if the handler in its configuration, `HANDLER/CONFIG`, is among those that we were given. All other
devices are none of our business: they are not opened, and their events are not answered.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import AsyncIterator, Container, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import trio

from . import _adoption, _control, _lio, _native, _sysfs
from ._domain import CopyDomain
from ._errors import DeviceError, DeviceRemovedError
from ._handler import Handler, Options, check
from ._netlink import DeviceEvents, Rescan
from ._runtime import GRACE
from ._service import serve_uio, verbs
from ._slot import Slot
from ._upgrade import UpgradeError

if TYPE_CHECKING:
    from ._native import DeviceEvent
    from ._runtime import Device
    from ._sysfs import UioDevice
    from ._upgrade import Inherited, Succession

_log = logging.getLogger("tcmu_rs")

_Key = tuple[int, str]

_SERIAL_WITHIN = 2.0
"""Seconds for a device's serial number to appear: rtslib writes it after the kernel has announced the device."""


class _Service:
    def __init__(self, uio: UioDevice) -> None:
        self.uio = uio
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.claim: _adoption.Claim | None = None
        self.inherited: Inherited | None = None
        self.device: Device | None = None
        self.removed = False

    def block(self) -> None:
        """Tells initiators that the device is busy, until somebody serves it again."""
        # Not when the kernel removes it: configfs below its HBA waits for our answer then, and we would for it.
        if not self.removed:
            with suppress(OSError, _lio.LioError):
                _lio.block(_lio.Backstore(self.uio.name, self.uio.hba, ""))


class EndedError(Exception):
    """The only device of a daemon is no longer served; the reason was logged.

    Attributes:
        removed: The kernel has removed it.
    """

    def __init__(self, *, removed: bool) -> None:
        super().__init__("removed" if removed else "ended")
        self.removed = removed


class Daemon:
    """The devices being served; made by `serve_all`."""

    def __init__(
        self,
        handlers: Mapping[str, type[Handler]],
        events: DeviceEvents,
        grace: float,
        copy_domain: CopyDomain | None,
        succession: Succession | None,
        only: str | None,
    ) -> None:
        self._handlers = handlers
        self._events = events
        self._grace = grace
        self._succession = succession
        self._copy_domain = copy_domain
        self._only = only
        self._only_served = trio.Event()
        self._services: dict[_Key, _Service] = {}
        self._quiet = trio.Lock()

    @property
    def devices(self) -> list[Device]:
        """Those whose commands flow."""
        return [service.device for service in self._services.values() if service.device is not None]

    @asynccontextmanager
    async def _estate(self) -> AsyncIterator[dict[str, Device]]:
        """What an upgrade hands over, by `HBA/NAME`; nothing is added to it within the block."""
        async with self._quiet:
            devices = {}
            for (hba, name), service in self._services.items():
                if service.device is None:
                    raise UpgradeError(f"device {name} is just being opened or closed: try again")
                devices[f"{hba}/{name}"] = service.device
            yield devices

    def hurry(self) -> None:
        """Ends the grace period of devices that are stopping."""
        for device in self.devices:
            device.shorten_grace()

    async def _run(self, task_status: trio.TaskStatus[Daemon]) -> None:
        async with trio.open_nursery() as nursery:
            if self._succession is not None:
                await self._succeed(self._succession, nursery)
            self._rescan(nursery)
            nursery.start_soon(_control.offer, verbs(lambda: self.devices))
            if self._only is not None:
                if not self._services:
                    raise EndedError(removed=True)
                nursery.start_soon(self._listen, nursery)
                await self._only_served.wait()
            task_status.started(self)
            if self._only is None:
                await self._listen(nursery)

    async def _listen(self, nursery: trio.Nursery) -> None:
        async for event in self._events:
            async with self._quiet:
                if isinstance(event, Rescan):
                    self._rescan(nursery)
                elif (parsed := _sysfs.parse_uio_name(event.name)) and self._is_ours(*parsed):
                    await self._take(event, parsed[:2], nursery)

    async def _succeed(self, succession: Succession, nursery: trio.Nursery) -> None:
        """Serves what the predecessor hands over, and looks at nothing else before that one has let go."""
        for key in succession.devices:
            inherited = succession.take(key)
            assert inherited is not None
            claim = await trio.to_thread.run_sync(_adoption.inherit, key, inherited.fd)
            service = _Service(claim.uio)
            service.claim, service.inherited = claim, inherited
            self._services[claim.uio.hba, claim.uio.name] = service
            nursery.start_soon(self._serve, service, None)
        await succession.committed.wait()

    async def _take(self, event: DeviceEvent, key: _Key, nursery: trio.Nursery) -> None:
        if event.kind == "removed":
            if service := self._services.get(key):
                service.removed = True
                service.scope.cancel()
                await service.ended.wait()
            self._events.reply(event)
        elif event.kind == "reconfig":
            nursery.start_soon(self._reconfigure, event, key)
        elif (uio := await trio.to_thread.run_sync(_sysfs.find, *key)) is None:
            self._events.reply(event, -errno.ENODEV)
        else:
            self._start(uio, event, nursery)

    async def _reconfigure(self, event: DeviceEvent, key: _Key) -> None:
        """Does what somebody has written to an attribute of a device in service: `dev_size`, if it grows."""
        status = -errno.EINTR
        try:
            status = await self._resize(event.size, key)
        finally:
            # Also when the daemon ends meanwhile: whoever has written waits for it, for ever.
            self._events.reply(event, status)

    async def _resize(self, size: int | None, key: _Key) -> int:
        """Returns 0, or a negative error number."""
        name = "/".join(map(str, key))
        service = self._services.get(key)
        if size is None:
            _log.warning("%s: only the size of a device in service can be changed", name)
            return -errno.EOPNOTSUPP
        if service is None or service.device is None:
            return -errno.EAGAIN
        device = service.device
        try:
            await device.resize(size)
        except Exception as error:
            _log.error("%s: not resized: %s", name, error)
            # Where the kernel does not wait for us it has taken the number over already.
            with suppress(_lio.LioError, OSError, trio.TooSlowError), trio.fail_after(_SERIAL_WITHIN):
                backstore = _lio.Backstore(device.name, key[0], "")
                await trio.to_thread.run_sync(_lio.set_size, backstore, device.size, abandon_on_cancel=True)
            return -((error.errno if isinstance(error, OSError) else 0) or errno.EINVAL)
        return 0

    def _rescan(self, nursery: trio.Nursery) -> None:
        for uio in _sysfs.scan():
            if (uio.hba, uio.name) not in self._services and self._is_ours(uio.hba, uio.name, uio.config):
                self._start(uio, _unanswered(uio), nursery)

    def _is_ours(self, hba: int, name: str, config: str) -> bool:
        return self._handler_of(config) is not None and self._only in (None, f"{hba}/{name}")

    def _handler_of(self, config: str) -> type[Handler] | None:
        return self._handlers.get(config.partition("/")[0])

    def _start(self, uio: UioDevice, event: DeviceEvent | None, nursery: trio.Nursery) -> None:
        key = (uio.hba, uio.name)
        if key in self._services:
            # Found by the scan already, which the announcement overlapped.
            if event is not None:
                self._events.reply(event)
            return
        self._services[key] = _Service(uio)
        nursery.start_soon(self._serve, self._services[key], event)

    async def _serve(self, service: _Service, event: DeviceEvent | None) -> None:
        """Serves one device; whatever happens to it stays with it."""
        uio = service.uio
        removed = False
        try:
            with service.scope:
                await self._open_and_serve(service, event)
        # What it is cancelled with, at the daemon's end, goes on.
        except* Exception as group:
            if service.inherited is not None and not service.inherited.is_ours:
                raise
            for error in leaves(group):
                removed |= isinstance(error, DeviceRemovedError)
                expected = isinstance(error, OSError | ValueError | TypeError | DeviceError | _lio.LioError)
                _log.error("%s: not served: %s", uio.name, error, exc_info=None if expected else error)
        finally:
            del self._services[uio.hba, uio.name]
            service.ended.set()
        if self._only is not None:
            # Who answers for its removal has been woken up, and cannot be cancelled before it has.
            raise EndedError(removed=removed or service.removed)

    async def _open_and_serve(self, service: _Service, event: DeviceEvent | None) -> None:
        uio = service.uio
        backstore = _lio.Backstore(uio.name, uio.hba, "")
        kind = self._handler_of(uio.config)
        assert kind is not None
        async with AsyncExitStack() as stack:
            if service.claim is not None:
                stack.callback(service.claim.close)
            elif event is None:
                # Before the storage is opened, which may take long: what the process before us left waits already.
                await self._claim(service, backstore, stack)
            await self._open_handler_and_serve(service, kind, backstore, event, stack)

    async def _claim(self, service: _Service, backstore: _lio.Backstore, stack: AsyncExitStack) -> None:
        """Takes a device that may have been served before, and may be in use."""
        service.claim = claim = await trio.to_thread.run_sync(_adoption.Claim, backstore, service.uio)
        stack.callback(claim.close)
        await trio.to_thread.run_sync(claim.fence)

    async def _open_handler_and_serve(
        self,
        service: _Service,
        kind: type[Handler],
        backstore: _lio.Backstore,
        event: DeviceEvent | None,
        stack: AsyncExitStack,
    ) -> None:
        uio = service.uio
        try:
            size, block_size = await trio.to_thread.run_sync(_shape, backstore)
            config, extra = _lio.parse_config(uio.config.partition("/")[2])
            options = Options(size=size, block_size=block_size, extra=extra)
            was_served = service.claim is not None and service.claim.was_served
            handler = (
                _adoption.remade(kind, config, options, uio.name) if was_served else kind.from_config(config, options)
            )
            if was_served and not handler.persistent:
                raise _lio.LioError(
                    f"what {uio.config} stored has gone with the process that served it",
                    f"remove the device, for instance: tcmu-rs detach {uio.name}",
                )
            await handler.open()
        except BaseException as error:
            # The program that makes the device gets the error number, and the device is gone.
            if event is not None:
                self._events.reply(event, -((error.errno if isinstance(error, OSError) else 0) or errno.EINVAL))
            raise
        slot = Slot(handler)
        try:
            try:
                check(handler)
                grown = was_served and handler.size > size
                if handler.block_size != block_size or (handler.size != size and not grown):
                    raise ValueError(
                        f"the kernel was told {size} bytes in blocks of {block_size}, "
                        f"the storage has {handler.size} in blocks of {handler.block_size}"
                    )
            except (TypeError, ValueError):
                if event is not None:
                    self._events.reply(event, -errno.EINVAL)
                raise
            if event is not None:
                self._events.reply(event)
                await self._claim(service, backstore, stack)
            async with trio.open_nursery() as nursery:
                service.device = await nursery.start(self._serve_ring, slot, service, backstore)
                _log.info("%s: serving %s", uio.name, uio.config)
                self._only_served.set()
        finally:
            service.device = None
            with trio.move_on_after(self._grace, shield=True):
                await slot.aclose()

    async def _serve_ring(
        self, slot: Slot, service: _Service, backstore: _lio.Backstore, task_status: trio.TaskStatus[Device]
    ) -> None:
        await serve_uio(
            slot,
            service.uio,
            name=service.uio.name,
            wwn=await _serial(backstore),
            claimed=service.claim,
            inherited=service.inherited,
            before_stop=service.block,
            grace=self._grace,
            copy_domain=self._copy_domain,
            task_status=task_status,
        )


def _shape(backstore: _lio.Backstore) -> tuple[int, int]:
    attributes = backstore.path / "attrib"
    return int((attributes / "dev_size").read_text()), int((attributes / "hw_block_size").read_text())


async def _serial(backstore: _lio.Backstore) -> str:
    """The serial number that the device was given, or one made from its name."""
    with trio.move_on_after(_SERIAL_WITHIN):
        while True:
            if serial := await trio.to_thread.run_sync(_lio.serial_number, backstore):
                return serial
            await trio.sleep(0.05)
    return _lio.default_wwn(backstore.name, "")


def leaves(error: BaseException) -> list[Any]:
    """The errors of a group, or the error itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in leaves(inner)]


def _unanswered(uio: UioDevice) -> DeviceEvent | None:
    """The announcement of a device for whose maker the kernel waits: whoever it was meant for is gone."""
    path = _lio.Backstore(uio.name, uio.hba, "").path
    with suppress(OSError, ValueError):
        if (path / "enable").read_text().strip() == "0":
            number = int((path / "statistics/scsi_dev/indx").read_text())
            return _native.DeviceEvent.added(f"tcm-user/{uio.hba}/{uio.name}/{uio.config}", uio.minor, number)
    return None


def fence_unserved(handlers: Container[str], only: str | None = None) -> None:
    """Has the kernel answer "busy" for the devices of these handlers that nobody serves. Blocking."""
    for uio in _sysfs.scan():
        if uio.config.partition("/")[0] in handlers and only in (None, f"{uio.hba}/{uio.name}"):
            with suppress(OSError, _lio.LioError):
                claim = _adoption.Claim(_lio.Backstore(uio.name, uio.hba, ""), uio)
                try:
                    claim.fence()
                finally:
                    claim.close()


async def serve_all(
    handlers: Mapping[str, type[Handler]],
    *,
    replies: bool = False,
    grace: float = GRACE,
    only: str | None = None,
    _succession: Succession | None = None,
    copy_domain: CopyDomain | None = None,
    task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves every device of this machine whose handler is among `handlers`, those to come too.

    Args:
        handlers: Classes by the name that devices are configured with.
        replies: Let the kernel wait for our answer when a device is made or removed, so that a device whose storage
            cannot be opened is refused where it is made. This is a switch of the whole machine and stays on: devices
            of handlers that nobody serves then hang whoever makes them.
        grace: Seconds for commands in flight when a device stops.
        copy_domain: Lets initiators copy between all the devices.
        task_status: Gets the `Daemon` when the present devices have been looked at.

    Resource handling: a device whose server stops is left to its LUNs, and blocked: initiators are told that it is
    busy until somebody serves it again.

    Error handling: what happens to one device is logged and stays with it.

    Raises:
        FileNotFoundError: The kernel module `target_core_user` is not loaded.
        PermissionError: We are not root.
    """
    with DeviceEvents() as events:
        if replies:
            events.set_features(True)
        _log.debug("process %d serves %s", os.getpid(), ", ".join(handlers))
        await Daemon(handlers, events, grace, copy_domain, _succession, only)._run(task_status)


@asynccontextmanager
async def serving(
    handlers: Mapping[str, type[Handler]],
    *,
    replies: bool = False,
    grace: float = GRACE,
    copy_domain: CopyDomain | None = None,
    only: str | None = None,
    _succession: Succession | None = None,
) -> AsyncIterator[Daemon]:
    """`serve_all` for the length of an `async with` block."""
    serve = functools.partial(
        serve_all, handlers, replies=replies, grace=grace, copy_domain=copy_domain, only=only, _succession=_succession
    )
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve)
        nursery.cancel_scope.cancel()
