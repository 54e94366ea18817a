"""Devices that exist as long as a block of a trio program: `attach` and `serve`."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import trio

from . import _adoption, _control, _lio, _sysfs
from ._domain import CopyDomain
from ._handler import Handler, check
from ._registry import parse_spec
from ._runtime import GRACE
from ._service import serve_uio, verbs
from ._slot import Slot

if TYPE_CHECKING:
    from ._runtime import Device
    from ._statistics import DeviceStatistics
    from ._upgrade import Inherited, Succession

_log = logging.getLogger("tcmu_rs")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class AttachedDevice:
    """A device in service, as `attach` and `serve` hand it out.

    Attributes:
        name: Name of the backstore.
        handler: What serves it.
        block_size: Bytes of a logical block.
        fabric: `loopback`, `iscsi` or `none`.
        path: `/dev/sdX`; None unless the fabric is loopback.
        target: Name of the target that offers it, `naa.…` or `iqn.…`; None without a fabric.
        configfs: The backstore's directory.
        hba: N of the directory `user_N` that holds it.
        wwn: Unit serial number.
        uio: The device's node and mapping.
    """

    def __init__(self, handler: Handler, backstore: _lio.Backstore, uio: _sysfs.UioDevice, fabric: _lio.Fabric) -> None:
        self.name = backstore.name
        self.handler = handler
        self.block_size: int = handler.block_size
        self.fabric = fabric
        self.path: str | None = None
        self.target: str | None = None
        self.configfs: Path = backstore.path
        self.hba = backstore.hba
        self.wwn = backstore.wwn
        self.uio = uio
        self._hurry = trio.Event()
        self._server: Device | None = None

    def __repr__(self) -> str:
        return f"<AttachedDevice {self.name} {self.path or self.target or self.configfs}>"

    @property
    def size(self) -> int:
        """Bytes, now."""
        return self.handler.size if self._server is None else self._server.size

    @asynccontextmanager
    async def _estate(self) -> AsyncIterator[dict[str, Device]]:
        """What an upgrade hands over, by `HBA/NAME`; nothing is added to it within the block."""
        yield {f"{self.hba}/{self.name}": self._server} if self._server else {}

    def statistics(self) -> DeviceStatistics:
        """Counters and times since the device is served, and what runs and waits now: see `Device.statistics`."""
        if self._server is None:
            raise RuntimeError(f"device {self.name} is not served yet")
        return self._server.statistics()

    async def replace(self, handler: Handler, *, within: float = GRACE) -> None:
        """Has another handler serve the device, which stays in service: see `Device.replace`."""
        if self._server is None:
            raise RuntimeError(f"device {self.name} is not served yet")
        await self._server.replace(handler, within=within)
        self.handler = handler

    async def resize(self, size: int, *, shrink: bool = False, within: float = GRACE) -> None:
        """Changes the size of the device, which stays in service: see `Device.resize`.

        A disk of this machine has it when this returns. Initiators of other fabrics look when they are told to.
        """
        if self._server is None:
            raise RuntimeError(f"device {self.name} is not served yet")
        await self._server.resize(size, shrink=shrink, within=within)
        await _blocking(_lio.rescan, _lio.Backstore(self.name, self.hba, self.wwn))

    async def change_snapshots(self, action: str, name: str, *, within: float = GRACE) -> None:
        """Keeps the state of the disk, which stays in service, or forgets one: see `Device.change_snapshots`."""
        if self._server is None:
            raise RuntimeError(f"device {self.name} is not served yet")
        await self._server.change_snapshots(action, name, within=within)

    def hurry(self) -> None:
        """Ends the grace period of the detaching, that in progress or the coming one."""
        self._hurry.set()
        if self._server is not None:
            self._server.shorten_grace()


@asynccontextmanager
async def attach(
    handler: Handler,
    name: str | None = None,
    *,
    spec: str | None = None,
    options: Mapping[str, str] | None = None,
    fabric: _lio.Fabric = "loopback",
    wwn: str | None = None,
    iqn: str | None = None,
    portal: str = "127.0.0.1:3260",
    allow_network: bool = False,
    max_sectors: int | None = None,
    data_area_mb: int | None = None,
    data_pages_per_block: int | None = None,
    ring_mb: int | None = None,
    cmd_time_out: int | None = None,
    deadline: float | None = None,
    busy_poll: float = 0.0,
    copy_domain: CopyDomain | None = None,
    adopt: bool = False,
    leave_on_error: bool = False,
    strict: bool = False,
    ready_within: float = 30.0,
    grace: float = 10.0,
    _succession: Succession | None = None,
) -> AsyncIterator[AttachedDevice]:
    """Makes a disk from a handler, for the length of an `async with` block.

    The block begins when the disk is usable: its node exists, opens and has its size. When the block ends,
    however it ends, the disk is written back and taken away while it is still served, then the server stops,
    then the rest is removed.

    Args:
        handler: What serves the disk. It is opened and closed here.
        name: Name of the device; derived from `spec` or the handler's class if None.
        spec: `HANDLER:CONFIG`, which the kernel keeps and `tcmu-rs list` shows. It is a label here, nothing is opened
            by it. Never put a secret into it.
        options: What the handler was told beside the spec; a label like that. Everybody can read it.
        fabric: `loopback` for a disk of this machine, `iscsi` for a target of its own, `none` for a backstore
            only.
        wwn: Unit serial number, a UUID; computed from name and spec if None, and so the same each time.
        iqn: Name of the iSCSI target; computed from the serial number if None.
        portal: `ADDRESS:PORT` of the iSCSI target.
        allow_network: Permit a portal that other machines reach; there is no authentication.
        max_sectors: Largest transfer that initiators are told, in blocks.
        data_area_mb: Memory that commands in flight may fill, MiB.
        data_pages_per_block: Pages that this memory is taken in: fewer and larger pieces for a handler, and more waste.
        ring_mb: Memory for the commands themselves, MiB, 8 at most.
        cmd_time_out: Seconds after which the kernel fails a command that was not answered; 0 means never.
        deadline: Seconds after which we cancel a command and answer it as timed out, so that it is sent again; five
            sixths of `cmd_time_out` if None, `math.inf` for never.
        busy_poll: Seconds that the server looks for the next command before it sleeps, at most. Saves the time of
            waking it up, and takes a processor meanwhile.
        copy_domain: The disks that initiators may copy from and to, beside this one itself.
        adopt: Go on with the device of this name (without a name: of this spec) if a killed process has left one, and
            make one otherwise. Its initiators notice a pause: what was in flight goes back to them as BUSY, and they
            send it again; and they are told that the disk was reset. Name, spec, options, `read_only`, block size,
            serial number and fabric must be the same, the storage no smaller, and the handler `persistent`. The spec is
            what tells one storage from another here: give one.
        leave_on_error: If the block or the server ends with an error, leave the device in its place, blocked, for a
            successor to adopt. An adopted device is left too if it cannot be served.
        strict: Let a bug in the handler end the device instead of one command.
        ready_within: Seconds that the disk may take to become usable.
        grace: Seconds that writing back and taking away may take with the handler's help. Afterwards, commands in
            flight are cancelled and what the kernel still held in memory is lost.

    Yields:
        The device.

    Resource handling: All that was made in the kernel is removed, also on errors and on cancellation, which
    is held off until then. Only SIGKILL leaves something behind, for `adopt` to go on with or `tcmu-rs detach` to
    remove.

    Error handling: If the ring breaks, the handler fails as a whole or another program removes the device,
    the block is cancelled and the error raised. From the moment the device is served there is a nursery
    around the block, so errors of block and server arrive in an exception group.

    Raises:
        BackstoreExistsError: The name is taken: by a device that a live process serves, or that is another one.
        LioError: The kernel could not be set up; the text says what to do.
    """
    handler_name, config = parse_spec(spec) if spec else ("python", _class_name(handler))
    shape = _Shape(
        name,
        handler_name,
        config,
        options or {},
        wwn=wwn,
        max_sectors=max_sectors,
        data_area_mb=data_area_mb,
        data_pages_per_block=data_pages_per_block,
        ring_mb=ring_mb,
        cmd_time_out=cmd_time_out,
    )
    # Before the storage is opened, which may make it.
    shape.check()
    if fabric == "iscsi":
        _lio.check_iscsi(iqn, portal, allow_network=allow_network)
    await _blocking(_lio.prepare)
    inherited = None
    claiming: Callable[[], _adoption.Claim | None] | None = partial(shape.claim, handler) if adopt else None
    if _succession is not None:
        (key,) = _succession.devices
        inherited = _succession.take(key)
        assert inherited is not None
        claiming = partial(shape.inherit, key, inherited.fd)
    async with _claimed(claiming) as claim, _opened(handler, grace) as slot:
        check(handler)
        backstore = await _blocking(shape.verify, claim, handler) if claim else None
        if backstore is None:
            backstore = await _blocking(shape.create, handler)
        service = None
        try:
            uio = await _blocking(_sysfs.find, backstore.hba, backstore.name)
            if uio is None or not await trio.Path(uio.path).exists():
                raise _lio.LioError(
                    f"device {backstore.name} has no node in /dev",
                    "mount -t devtmpfs none /dev, or run outside the container",
                )
            device = AttachedDevice(handler, backstore, uio, fabric)
            service = _Service(
                device,
                slot,
                backstore,
                claim,
                inherited,
                strict=strict,
                grace=grace,
                deadline=deadline,
                busy_poll=busy_poll,
                copy_domain=copy_domain,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run_server, nursery)
                try:
                    await service.wait_started()
                    nursery.start_soon(service.run_control)
                    if fabric == "iscsi":
                        await service.expose(
                            partial(_lio.expose_iscsi, backstore, iqn, portal, allow_network=allow_network),
                            partial(_adoption.exposure, backstore, fabric, target=iqn, portal=portal),
                        )
                    elif fabric == "loopback":
                        await service.expose(
                            partial(_lio.expose_loopback, backstore), partial(_adoption.exposure, backstore, fabric)
                        )
                        if claim is not None:
                            await service.rescan()
                        device.path = await _wait_usable(device, ready_within)
                    service.leaves = leave_on_error
                    yield device
                except BaseException as error:
                    service.failed |= _is_failure(error)
                    raise
                finally:
                    with trio.CancelScope(shield=True):
                        await service.end()
        finally:
            if not (service.left if service else claim):
                with trio.CancelScope(shield=True):
                    await _blocking(_lio.remove_backstore, backstore)


async def serve(
    handler: Handler,
    name: str,
    *,
    spec: str | None = None,
    wwn: str | None = None,
    copy_domain: CopyDomain | None = None,
    strict: bool = False,
    task_status: trio.TaskStatus[AttachedDevice] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Creates backstore `name` and serves it until cancelled; others make LUNs of it, with targetcli for instance.

    Args:
        handler: What serves the device. It is opened and closed here.
        name: Name of the backstore.
        spec: As for `attach`.
        wwn: As for `attach`.
        copy_domain: As for `attach`.
        strict: Let a bug in the handler end the device instead of one command.
        task_status: Gets the device when commands flow.

    Resource handling and error handling: as for `attach`. LUNs of others must be gone before: while one is
    there, the backstore cannot be removed.

    Raises:
        LioError: The kernel could not be set up; the text says what to do.
    """
    async with attach(
        handler, name, spec=spec, fabric="none", wwn=wwn, copy_domain=copy_domain, strict=strict
    ) as device:
        task_status.started(device)
        await trio.sleep_forever()


class _Service:
    """The server of one device beside the LUN that depends on it.

    **Liveness.** Making and removing a LUN wait for the device, in the kernel, where nobody can interrupt
    them. So the server is shielded from the cancellation that strikes the rest, and stops only when the LUN
    is gone or the grace period over; and if it ends while there may be a LUN, for whatever reason, the kernel
    is made to fail the commands that nobody will answer, until there is none.
    """

    def __init__(
        self,
        device: AttachedDevice,
        slot: Slot,
        backstore: _lio.Backstore,
        claim: _adoption.Claim | None,
        inherited: Inherited | None,
        *,
        strict: bool,
        grace: float,
        deadline: float | None,
        busy_poll: float,
        copy_domain: CopyDomain | None,
    ) -> None:
        self.leaves = claim is not None
        self.failed = False
        self._device = device
        self._slot = slot
        self._backstore = backstore
        self._claim = claim
        self._inherited = inherited
        self._strict = strict
        self._grace = grace
        self._deadline = deadline
        self._busy_poll = busy_poll
        self._copy_domain = copy_domain
        self._server_scope = trio.CancelScope(shield=True)
        self._control_scope = trio.CancelScope()
        self._started = trio.Event()
        self._exposure: _lio.Exposure | None = None
        # Of the threading kind, since `fail_commands` waits for it in a thread.
        self._no_lun = threading.Event()
        self._no_lun.set()

    async def run_server(self, nursery: trio.Nursery) -> None:
        """Serves the device until `take_down`; any other end is an error."""
        try:
            with self._server_scope:
                await serve_uio(
                    self._slot,
                    self._device.uio,
                    name=self._device.name,
                    wwn=self._device.wwn,
                    claimed=self._claim,
                    inherited=self._inherited,
                    strict=self._strict,
                    grace=self._grace,
                    deadline=self._deadline,
                    busy_poll=self._busy_poll,
                    copy_domain=self._copy_domain,
                    # Not through `Nursery.start`: cancelled meanwhile, it would wait for this shielded task
                    # for ever.
                    task_status=self,
                )
        except BaseException:
            self.failed = True
            raise
        finally:
            if self._is_anothers:
                pass
            elif self.left:
                with trio.CancelScope(shield=True):
                    await _blocking(_adoption.fence, self._backstore)
            elif not self._no_lun.is_set():
                nursery.start_soon(self._fail_commands)
        if not self._server_scope.cancel_called:
            raise _lio.LioError(f"device {self._device.name} was removed by another program")

    async def run_control(self) -> None:
        """Answers other processes' questions about the device, until `take_down`."""
        with self._control_scope:
            await _control.offer(verbs(lambda: [self._device._server] if self._device._server else []))

    def started(self, value: Any = None) -> None:
        """Called by the server, with the `Device`, when commands flow."""
        self._device._server = value
        self._started.set()

    async def wait_started(self) -> None:
        """Waits until commands flow."""
        await self._started.wait()

    async def _fail_commands(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                await _blocking(_lio.fail_commands, self._backstore, self._no_lun)
            except _lio.LioError as error:
                _log.error("%s: commands wait for their time-out: %s", self._device.name, error)

    async def expose(self, how: Callable[[], _lio.Exposure], again: Callable[[], _lio.Exposure | None]) -> None:
        """Makes the LUN; finished once begun, also when cancelled: `end` must know what there is.

        Args:
            how: Makes it.
            again: Finds the one that an adopted device has.
        """
        self._no_lun.clear()
        try:
            if self._claim is not None:
                self._exposure = await _blocking(again)
            if self._exposure is None:
                self._exposure = await _blocking(how)
        finally:
            if self._exposure is None:
                self._no_lun.set()
        self._device.target = self._exposure.wwn

    async def rescan(self) -> None:
        """Has an adopted disk look for its size, if it is not what the server before has told it."""
        disk = await _blocking(_disk, self._exposure) if self._exposure else None
        if disk is not None and disk.size != self._device.size:
            await _blocking(_lio.rescan, self._backstore)

    @property
    def left(self) -> bool:
        """Whether the device stays for a successor, or with the predecessor."""
        return (self.leaves and self.failed) or self._is_anothers

    @property
    def _is_anothers(self) -> bool:
        return self._inherited is not None and not self._inherited.is_ours

    async def end(self) -> None:
        """Removes the LUN with the server's help, or leaves it to a successor, then ends the server. To be shielded."""
        try:
            if self._is_anothers:
                pass
            elif self.left:
                _log.warning("%s: left in its place, blocked, until it is adopted", self._device.name)
                await _blocking(_lio.block, self._backstore)
            else:
                await self._take_down_lun()
        finally:
            self._control_scope.cancel()
            self._server_scope.cancel()

    async def _take_down_lun(self) -> None:
        async with trio.open_nursery() as nursery:
            withdrawn = trio.Event()
            nursery.start_soon(self._withdraw, withdrawn)
            with trio.move_on_after(self._grace):
                await _first(withdrawn, self._device._hurry)
            if withdrawn.is_set():
                # There may be LUNs of other programs: to them the device is busy from now on, not silent.
                await _blocking(_lio.block, self._backstore)
            else:
                _log.warning("%s: not idle in time, its commands are cancelled", self._device.name)
                # With them, whatever the removal of the LUN waits for.
                self._server_scope.cancel()

    async def _withdraw(self, withdrawn: trio.Event) -> None:
        try:
            if self._exposure is None:
                return
            with trio.move_on_after(self._grace / 2) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_on, self._device._hurry, patience)
                    if disk := await _blocking(_disk, self._exposure):
                        # It has nothing to clean up, so it may be left to itself if it hangs.
                        await trio.to_thread.run_sync(_sysfs.write_back, disk, abandon_on_cancel=True)
                    nursery.cancel_scope.cancel()
            await _blocking(_lio.withdraw, self._exposure)
        finally:
            self._no_lun.set()
            withdrawn.set()


class _Shape:
    """What was asked for: to make a device of, or to compare one with that a dead process has left."""

    def __init__(
        self,
        name: str | None,
        handler: str,
        config: str,
        options: Mapping[str, str],
        *,
        wwn: str | None,
        **limits: int | None,
    ) -> None:
        self._name = name
        self._handler = handler
        self._config = config
        self._options = options
        self._wwn = wwn
        self._limits = limits

    def check(self) -> None:
        """Refuses what the kernel cannot carry, as far as that is known without the storage."""
        if self._name is not None:
            _lio.check_name(self._name)
        _lio.device_config(self._handler, self._config)
        _lio.check_limits(self._wwn, **{key: limit for key, limit in self._limits.items() if key != "cmd_time_out"})

    def claim(self, handler: Handler) -> _adoption.Claim | None:
        """Claims the device that a dead process has left, if there is one, and fences it."""
        dev_config = _lio.device_config(self._handler, self._config)
        claim = _adoption.find(self._name, dev_config, persistent=handler.persistent)
        if claim is not None:
            try:
                claim.fence()
            except BaseException:
                claim.close()
                raise
        return claim

    def inherit(self, key: str, fd: int) -> _adoption.Claim:
        """Takes over what the predecessor hands over."""
        claim = _adoption.inherit(key, fd)
        if claim.uio.config != _lio.device_config(self._handler, self._config):
            raise _lio.LioError(f"{claim.uio.config} was handed over, not {self._handler}:{self._config}")
        return claim

    def verify(self, claim: _adoption.Claim, handler: Handler) -> _lio.Backstore:
        """Refuses a device that is not as it was asked for."""
        backstore = claim.backstore
        wanted: dict[str, object] = {"hw_block_size": handler.block_size}
        limits = dict(self._limits)
        if (sectors := limits.pop("max_sectors")) is not None:
            wanted["hw_max_sectors"] = _lio.whole_pages(sectors, handler.block_size)
        names = {
            "data_area_mb": "max_data_area_mb",
            "data_pages_per_block": "data_pages_per_blk",
            "ring_mb": "cmd_ring_size_mb",
        }
        # An old kernel does not have them all.
        wanted |= {names.get(key, key): value for key, value in limits.items() if value is not None}
        wwn = self._wwn or _lio.default_wwn(backstore.name, _lio.device_config(self._handler, self._config))
        _adoption.check_same(backstore, wanted, wwn)
        if claim.was_handed_over:
            # By a server with the same command line, whose version may have left no note.
            _lio.set_note(backstore, self._note(handler))
        else:
            _adoption.check_note(backstore, self._note(handler))
        _adoption.check_size(backstore, handler.size)
        return backstore

    def _note(self, handler: Handler) -> str:
        return _adoption.note(getattr(handler, "read_only", False), self._options)

    def create(self, handler: Handler) -> _lio.Backstore:
        """Makes the device."""
        return _lio.create_backstore(
            self._name or _names(_stem(self._handler, self._config)),
            self._handler,
            self._config,
            handler.size,
            block_size=handler.block_size,
            note=self._note(handler),
            wwn=self._wwn,
            **self._limits,
        )


@asynccontextmanager
async def _claimed(
    claiming: Callable[[], _adoption.Claim | None] | None,
) -> AsyncIterator[_adoption.Claim | None]:
    claim = await _blocking(claiming) if claiming else None
    try:
        yield claim
    finally:
        if claim is not None:
            claim.close()


@asynccontextmanager
async def _opened(handler: Handler, grace: float) -> AsyncIterator[Slot]:
    """Opens a handler, and closes what is in its place in the end; what has to be stored then is not lost to a
    cancellation."""
    await handler.open()
    slot = Slot(handler)
    try:
        yield slot
    finally:
        with trio.move_on_after(grace, shield=True) as patience:
            await slot.aclose()
        if patience.cancelled_caught:
            _log.error("%s: closing took longer than %g s and was given up", _class_name(slot.handler), grace)


async def _blocking(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    # Not trio's limiter: these threads wait for devices, whose handlers may need its threads to answer.
    limiter = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=limiter)


async def _first(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(_cancel_on, event, nursery.cancel_scope)


async def _cancel_on(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _is_failure(error: BaseException) -> bool:
    """Whether it is more than a cancellation."""
    group = isinstance(error, BaseExceptionGroup) and error.subgroup(Exception) is not None
    return group or isinstance(error, Exception)


def _class_name(handler: Handler) -> str:
    return f"{type(handler).__module__}.{type(handler).__qualname__}"


def _stem(handler: str, config: str) -> str:
    """Makes a name from a specification: the file's name without its ending, or the handler's."""
    last = config.rstrip("/").rpartition("/")[2]
    stem = last.rpartition(".")[0] or last if handler != "python" else last.rpartition(".")[2].lower()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:100] or handler


def _names(stem: str) -> Iterator[str]:
    yield stem
    for number in itertools.count(2):
        yield f"{stem}-{number}"


def _disk(exposure: _lio.Exposure) -> _sysfs.Disk | None:
    if exposure.fabric == "loopback" and (address := _lio.loopback_address(exposure.lun)):
        return _sysfs.scsi_disk(address)
    return None


async def _wait_usable(device: AttachedDevice, within: float) -> str:
    assert device.target is not None
    exposure = _lio.Exposure("loopback", device.target)
    why = "the kernel made no disk for it"

    def probe() -> tuple[str, str | None]:
        if (disk := _disk(exposure)) is None:
            return "", why
        return disk.path, _sysfs.why_unusable(disk, device.size)

    with trio.move_on_after(within):
        for attempt in itertools.count():
            # Opening a disk may hang with the handler; nothing is lost if the thread is left to itself.
            path, reason = await trio.to_thread.run_sync(probe, abandon_on_cancel=True)
            if reason is None:
                return path
            why = reason
            await trio.sleep(min(0.005 * 1.5**attempt, 0.1))
    raise _lio.LioError(f"device {device.name} is not usable after {within:g} s: {why}", "`dmesg` may say why")
