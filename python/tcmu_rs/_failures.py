"""How commands fail: what an initiator gets for what a handler has raised, and what people read of it in the log."""

from __future__ import annotations

import logging
import traceback

import trio

from . import _errors

logger = logging.getLogger("tcmu_rs")

ABORTED = _errors.Failure(_errors.TASK_ABORTED)
BUSY = _errors.Failure(_errors.BUSY)
"""Nothing was done for the command: the initiator may send it again."""
TIMED_OUT = _errors.Failure(_errors.CHECK_CONDITION, 0xB, 0x2E, 0x02)
"""COMMAND TIMEOUT DURING PROCESSING: initiators send such a command again, unlike one that the kernel has timed out."""
BUG = _errors.HardwareError.failure
INVALID_OPCODE = _errors.Failure(_errors.CHECK_CONDITION, 0x5, 0x20, 0x00)


def forget(error: BaseException) -> None:
    """Drops the tracebacks of an exception that is dealt with.

    They hold the frames of the handler, and these may hold views of the command's data; while somebody still has the
    exception (a thread on its way out, a record in a log, a circle of references) its memory could not be used again.
    """
    errors: list[BaseException | None] = [error]
    seen = set()
    while errors:
        this = errors.pop()
        if this is None or id(this) in seen:
            continue
        seen.add(id(this))
        this.__traceback__ = None
        errors += [this.__cause__, this.__context__]
        if isinstance(this, BaseExceptionGroup):
            errors += this.exceptions


class Failures:
    """Judges what the handlers of one device raise.

    Args:
        name: Of the device, for the log.
        strict: What they must not raise is to come out of the device.

    Attributes:
        strict: The same.
    """

    def __init__(self, name: str, *, strict: bool) -> None:
        self.strict = strict
        self._name = name
        self._bugs: set[tuple[str, str]] = set()

    def of(self, error: Exception, method: str, *, writing: bool) -> _errors.Failure:
        """What an initiator gets; `BUG` for what a handler must not raise. Logs either.

        Args:
            error: What was raised.
            method: `Class.method`, which raised it.
            writing: It was to do more than to read.
        """
        failure = _errors.failure_of(error, writing=writing)
        what = f"{method}()"
        if failure is not None:
            logger.warning("%s: %s failed: %s", self._name, what, error)
            return failure
        # Once per place: a broken handler must not fill the disk with its tracebacks.
        kind = (what, type(error).__name__)
        if kind not in self._bugs:
            self._bugs.add(kind)
            # As text: whoever keeps the record would keep the frames, too (see `forget`).
            text = "".join(traceback.format_exception(error))
            logger.error("%s: %s raised what it must not\n%s", self._name, what, text)
        return BUG

    def only_cancelled(self, error: BaseException, method: str, *, writing: bool) -> BaseException | None:
        """What is left of a cancellation without the errors of a handler that had tasks of its own; None if more is.

        Args:
            error: What was raised.
            method: As for `of`.
            writing: As for `of`.
        """
        if isinstance(error, trio.Cancelled):
            return error
        if not isinstance(error, BaseExceptionGroup):
            return None
        cancelled, rest = error.split(trio.Cancelled)
        if isinstance(rest, ExceptionGroup) and cancelled is not None and not self.strict:
            self.of(rest, method, writing=writing)
            rest = None
        return cancelled if rest is None else None
