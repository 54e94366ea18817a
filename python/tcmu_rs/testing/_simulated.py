"""The simulated kernel with an initiator on it."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from .. import _errors, _native
from .._domain import CopyDomain
from .._runtime import GRACE, Device
from .._service import serve_ring
from .._slot import Slot

if TYPE_CHECKING:
    from .._handler import Handler

CAP_OOOC = 1
"""The mailbox offers completion out of order."""
CAP_READ_LEN = 2
"""The mailbox offers short reads."""
CAP_TMR = 4
"""The mailbox announces task management."""
CAP_KEEP_BUF = 8
"""The mailbox lets an answered command keep its memory."""

ABORT_TASK = 1
LUN_RESET = 5

_TRANSFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """What the initiator got.

    Attributes:
        status: SAM status; 0 is GOOD.
        sense: Sense data, empty without CHECK CONDITION.
        data: Data-In.
        residual: Bytes of Data-In that were asked for and did not come.
    """

    status: int
    sense: bytes
    data: bytes
    residual: int

    @property
    def sense_code(self) -> tuple[int, int, int] | None:
        """Sense key, ASC and ASCQ, of either format; None without sense data."""
        if not self.sense:
            return None
        if self.sense[0] & 0x7F >= 0x72:
            return self.sense[1] & 0xF, self.sense[2], self.sense[3]
        return self.sense[2] & 0xF, self.sense[12], self.sense[13]

    def check(self) -> bytes:
        """Returns the data of a command that ended GOOD.

        Raises:
            ScsiError: It did not; with the status and the sense that came.
        """
        if self.status == 0:
            return self.data
        key, asc, ascq = self.sense_code or (0, 0, 0)
        raise _errors.ScsiError("the command failed", status=self.status, key=key, asc=asc, ascq=ascq)


class SimulatedDisk:
    """The initiator's side of a simulated device; made by `simulated`.

    Every method may be called from many tasks at once: that is how depth is made.

    Attributes:
        device: The device that is served.
        naa: Its NAA-6 designator, 16 bytes.
    """

    def __init__(self, kernel: _native.Simulator, naa: bytes) -> None:
        self.kernel = kernel
        self.naa = naa
        self.device: Device
        self._waiting: dict[int, trio.Event] = {}
        self._replies: dict[int, Reply] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return self.device.size

    @property
    def block_size(self) -> int:
        """Bytes of a logical block."""
        return self.device.block_size

    async def scsi(self, cdb: bytes, data_out: bytes = b"", *, data_in: int = 0) -> Reply:
        """Sends one command and waits for its answer, whatever it is.

        Args:
            cdb: The command descriptor block; filled up with zeroes to the length of its group.
            data_out: Data for the device.
            data_in: Bytes of room for data from the device.
        """
        return await self.wait(self.submit(cdb, data_out, data_in=data_in))

    def submit(self, cdb: bytes, data_out: bytes = b"", *, data_in: int = 0) -> int:
        """Sends one command and returns its ticket, for `wait` or `abort`."""
        ticket = self.kernel.submit(cdb, data_out, data_in)
        self._waiting[ticket] = trio.Event()
        self._collect()
        return ticket

    async def wait(self, ticket: int) -> Reply:
        """Waits for the answer to a command."""
        await self._waiting[ticket].wait()
        del self._waiting[ticket]
        return self._replies.pop(ticket)

    def answered(self, ticket: int) -> bool:
        """Whether the answer to a command is there, for `wait` to return at once."""
        self._collect()
        return ticket in self._replies

    def abort(self, *tickets: int, kind: int = ABORT_TASK) -> None:
        """Announces that commands are being aborted; they have to be answered all the same."""
        self.kernel.abort(kind, list(tickets))

    async def read(self, offset: int, length: int) -> bytes:
        """Reads bytes; offset and length are multiples of the block size.

        Raises:
            ScsiError: A command failed.
        """
        parts = []
        for at in range(offset, offset + length, _TRANSFER):
            part = min(_TRANSFER, offset + length - at)
            parts.append((await self.scsi(self._cdb(0x88, at, part), data_in=part)).check())
        return b"".join(parts)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Writes bytes; offset and length are multiples of the block size.

        Raises:
            ScsiError: A command failed.
        """
        for at in range(0, len(data), _TRANSFER):
            part = data[at : at + _TRANSFER]
            (await self.scsi(self._cdb(0x8A, offset + at, len(part), 8 if fua else 0), part)).check()

    async def flush(self) -> None:
        """SYNCHRONIZE CACHE of everything.

        Raises:
            ScsiError: The command failed.
        """
        (await self.scsi(struct.pack(">BBQLBB", 0x91, 0, 0, 0, 0, 0))).check()

    async def discard(self, offset: int, length: int) -> None:
        """UNMAP of one range.

        Raises:
            ScsiError: The command failed.
        """
        lba, blocks = self._blocks(offset, length)
        parameters = struct.pack(">HH4xQL4x", 22, 16, lba, blocks)
        (await self.scsi(struct.pack(">BB4xBHB", 0x42, 0, 0, len(parameters), 0), parameters)).check()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """WRITE SAME of a block of zeroes.

        Raises:
            ScsiError: The command failed.
        """
        cdb = self._cdb(0x93, offset, length, 8 if unmap else 0)
        (await self.scsi(cdb, bytes(self.block_size))).check()

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        if offset % self.block_size or length % self.block_size:
            raise ValueError(f"{length} bytes at {offset} are not whole blocks of {self.block_size}")
        return offset // self.block_size, length // self.block_size

    def _cdb(self, opcode: int, offset: int, length: int, flags: int = 0) -> bytes:
        lba, blocks = self._blocks(offset, length)
        return struct.pack(">BBQLBB", opcode, flags, lba, blocks, 0, 0)

    def _collect(self) -> None:
        for ticket, status, sense, data, residual in self.kernel.process():
            self._replies[ticket] = Reply(status, sense.rstrip(b"\0") and sense, data, residual)
            self._waiting[ticket].set()

    def _free_kept(self, cmd_id: int) -> None:
        # The kernel takes completions inside the write that rings: it knows by now what is kept.
        self._collect()
        assert self.kernel.free_kept(cmd_id), f"free_kept_buf of {cmd_id}, which is not kept"

    async def _listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.kernel.fileno())
            self._collect()


@asynccontextmanager
async def simulated(
    handler: Handler,
    *,
    name: str = "simulated",
    strict: bool = True,
    grace: float = GRACE,
    deadline: float = math.inf,
    busy_poll: float = 0.0,
    ring_size: int | None = None,
    data_size: int | None = None,
    data_block_size: int | None = None,
    capabilities: int | None = None,
    checks: bool = True,
    copy_domain: CopyDomain | None = None,
) -> AsyncGenerator[SimulatedDisk, None]:
    """Serves a handler on a simulated kernel for the length of an `async with` block.

    Args:
        handler: Opened at the start, closed at the end.
        name: For the log; the WWN is derived from it.
        strict: Exceptions that a handler must not raise come out of the block, as tests want it.
        grace: Seconds for commands in flight at the end.
        deadline: Seconds that a command may take.
        busy_poll: Seconds that the device looks for the next command before it waits, at most.
        ring_size: Bytes of mailbox and ring, a multiple of 4096 (1 MiB).
        data_size: Bytes of the data area (64 MiB).
        data_block_size: Bytes of a block of the data area, a multiple of 4096 (4096).
        capabilities: `CAP_*` flags of the mailbox (all).
        checks: Poison, scribble and compare; off for benchmarks.
        copy_domain: The disks that copies may be made from and to, beside this one itself.

    Raises:
        AssertionError: At the end, if the ring was handled against the rules or a command was not answered.
        DeviceError: The device failed.
    """
    kernel = _native.Simulator(
        ring_size=ring_size,
        data_size=data_size,
        block_size=data_block_size,
        capabilities=capabilities,
        checks=checks,
    )
    wwn = hashlib.sha256(name.encode()).digest()
    disk = SimulatedDisk(kernel, b"\x60" + wwn[:15])

    async def serve(task_status: trio.TaskStatus[Device]) -> None:
        slot = Slot(handler)
        await handler.open()
        try:
            await serve_ring(
                slot,
                memory=kernel.memory_fileno(),
                event=kernel.consumer_fileno(),
                map_size=kernel.size,
                name=name,
                serial=wwn[:8].hex(),
                naa=disk.naa,
                strict=strict,
                grace=grace,
                deadline=deadline,
                busy_poll=busy_poll,
                free_kept=disk._free_kept,
                copy_domain=copy_domain,
                task_status=task_status,
            )
        finally:
            await slot.aclose()

    # The initiator listens as long as the device lives: it gets the answers that the end of the device gives.
    async with trio.open_nursery() as listener:
        listener.start_soon(disk._listen)
        async with trio.open_nursery() as nursery:
            disk.device = await nursery.start(serve)
            try:
                yield disk
            except Exception:
                # A test that has failed is not to take ten seconds more.
                disk.device.shorten_grace()
                raise
            disk.device.stop()
        disk._collect()
        listener.cancel_scope.cancel()
    assert not kernel.violations, f"the ring was handled against the rules: {kernel.violations}"
    assert not kernel.broken, "the ring is broken"
    assert kernel.outstanding == 0, f"{kernel.outstanding} commands were never answered"
