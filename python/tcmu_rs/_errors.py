"""What goes wrong, in two classes that are never mixed.

A *command* failed: the handler raises a `ScsiError` (or an `OSError`), the initiator gets a status and sense data, and
the device goes on. The *device* failed: `DeviceError` comes out of `serve`.
"""

from __future__ import annotations

import errno
from typing import ClassVar, NamedTuple

GOOD = 0x00
CHECK_CONDITION = 0x02
BUSY = 0x08
TASK_SET_FULL = 0x28
TASK_ABORTED = 0x40


class DeviceError(Exception):
    """A device cannot be served any more; raised out of `serve`."""


class DeviceRemovedError(DeviceError):
    """The kernel removed the device while it was served."""


class RingCorruptError(DeviceError):
    """The shared memory holds what no kernel writes; it is not touched any more."""


class TransferCancelled(BaseException):
    """The command of a taskless method was aborted while it awaited a transfer: let it through, as `trio.Cancelled`."""


class CopyError(Exception):
    """A copy of a disk has failed; the text says where and why, and its cause is what was raised there."""


class DamagedFrameError(OSError):
    """A frame that `ZstdFrames.read_from` has read is damaged, cut off or not of a unit (EIO).

    Attributes:
        number: Which one, from 0.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(errno.EIO, message)
        self.number = number


class Failure(NamedTuple):
    """How a command fails: SAM status; sense key, ASC and ASCQ of a CHECK CONDITION; INFORMATION field."""

    status: int
    key: int = 0
    asc: int = 0
    ascq: int = 0
    information: int | None = None


class ScsiError(Exception):
    """A command fails with this status and sense data (SPC-5 clause 4.4).

    Raise a subclass, or this class with numbers. All of them are for handlers to raise and for
    `tcmu_rs.testing` to report.

    Args:
        message: For the log; initiators do not see it.
        key: Sense key.
        asc: Additional sense code.
        ascq: Additional sense code qualifier.
        information: The INFORMATION field: of a medium error, the first bad logical block address.
        status: SAM status; sense data goes with CHECK CONDITION (2) only.
    """

    failure: ClassVar[Failure] = Failure(CHECK_CONDITION, 0x4, 0x44, 0x00)

    def __init__(
        self,
        message: str = "",
        *,
        key: int | None = None,
        asc: int | None = None,
        ascq: int | None = None,
        information: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        default = self.failure
        self.status = default.status if status is None else status
        self.key = default.key if key is None else key
        self.asc = default.asc if asc is None else asc
        self.ascq = default.ascq if ascq is None else ascq
        self.information = information

    def __str__(self) -> str:
        text = super().__str__() or type(self).__name__
        if self.status != CHECK_CONDITION:
            return f"{text} (status {self.status:#04x})"
        return f"{text} (sense {self.key:X}/{self.asc:02X}/{self.ascq:02X})"

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class MediumError(ScsiError):
    """Stored data cannot be read, or not be written: UNRECOVERED READ ERROR, or WRITE ERROR from a write."""

    failure = Failure(CHECK_CONDITION, 0x3, 0x11, 0x00)


class WriteProtected(ScsiError):
    """The medium must not be changed."""

    failure = Failure(CHECK_CONDITION, 0x7, 0x27, 0x00)


class OutOfSpace(ScsiError):
    """SPACE ALLOCATION FAILED WRITE PROTECT: Linux turns it into ENOSPC."""

    failure = Failure(CHECK_CONDITION, 0x7, 0x27, 0x07)


class NotReady(ScsiError):
    """LOGICAL UNIT NOT READY, CAUSE NOT REPORTABLE: initiators try again for a while."""

    failure = Failure(CHECK_CONDITION, 0x2, 0x04, 0x00)


class MediumNotPresent(ScsiError):
    """There is no medium in the device."""

    failure = Failure(CHECK_CONDITION, 0x2, 0x3A, 0x00)


class IllegalRequest(ScsiError):
    """INVALID FIELD IN CDB."""

    failure = Failure(CHECK_CONDITION, 0x5, 0x24, 0x00)


class HardwareError(ScsiError):
    """INTERNAL TARGET FAILURE."""

    failure = Failure(CHECK_CONDITION, 0x4, 0x44, 0x00)


class Miscompare(ScsiError):
    """MISCOMPARE DURING VERIFY OPERATION; `information` is the offset of the first byte that differs."""

    failure = Failure(CHECK_CONDITION, 0xE, 0x1D, 0x00)

    def __init__(self, offset: int, message: str = "") -> None:
        super().__init__(message, information=offset)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.information, *self.args), self.__dict__)


class Busy(ScsiError):
    """BUSY: initiators send the command again."""

    failure = Failure(BUSY)


_ERRNO = {
    errno.ENOSPC: OutOfSpace.failure,
    errno.EDQUOT: OutOfSpace.failure,
    errno.EFBIG: OutOfSpace.failure,
    errno.ENOMEDIUM: MediumNotPresent.failure,
    errno.EAGAIN: Busy.failure,
    errno.EBUSY: Busy.failure,
    errno.ETIMEDOUT: Busy.failure,
    # Descriptors come back when other work ends.
    errno.EMFILE: Busy.failure,
    errno.ENFILE: Busy.failure,
    errno.ENOMEM: Failure(TASK_SET_FULL),
    # What the storage was on is gone: LOGICAL UNIT FAILURE.
    errno.ENODEV: Failure(CHECK_CONDITION, 0x4, 0x3E, 0x01),
    errno.ENXIO: Failure(CHECK_CONDITION, 0x4, 0x3E, 0x01),
    errno.ESTALE: Failure(CHECK_CONDITION, 0x4, 0x3E, 0x01),
}
_STATUSES = frozenset({CHECK_CONDITION, BUSY, 0x18, TASK_SET_FULL, 0x30, TASK_ABORTED})
_SENSE_KEYS = frozenset(range(0x10)) - {0xC}
_READ_ERROR = Failure(CHECK_CONDITION, 0x3, 0x11, 0x00)
_WRITE_ERROR = Failure(CHECK_CONDITION, 0x3, 0x0C, 0x00)
_PROTECTED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_MEDIUM = frozenset({errno.EIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN})


def failure_of(error: Exception, *, writing: bool) -> Failure | None:
    """What an initiator gets for an exception of a handler; None for one that is a bug.

    Of a group it is what the first one in it says, if none of them is a bug: handlers have nurseries.
    """
    if isinstance(error, ExceptionGroup):
        failures = [failure_of(part, writing=writing) for part in error.exceptions]
        return None if None in failures else failures[0]
    if isinstance(error, ScsiError):
        failure = Failure(error.status, error.key, error.asc, error.ascq, error.information)
        if writing and failure[:4] == MediumError.failure[:4]:
            return _WRITE_ERROR._replace(information=error.information)
        return failure if _exists(failure) else None
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _MEDIUM:
            return _WRITE_ERROR if writing else _READ_ERROR
        if error.errno in _PROTECTED and writing:
            return WriteProtected.failure
        return _ERRNO.get(error.errno)
    return None


def _exists(failure: Failure) -> bool:
    """Whether there is such a status, which means failure, and there can be such sense data."""
    return (
        failure.status in _STATUSES
        and failure.key in _SENSE_KEYS
        and 0 <= failure.asc <= 0xFF
        and 0 <= failure.ascq <= 0xFF
        and (failure.information is None or 0 <= failure.information < 1 << 64)
    )
