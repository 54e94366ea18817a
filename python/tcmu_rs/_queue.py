"""The commands of a device that wait for their turn: between the ring, where they come from, and the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

from . import _errors, _native
from ._domain import Piece
from ._failures import ABORTED, BUSY

BATCH = 64
"""Entries taken from the ring at once."""
LAST_BATCHES = 16
"""Batches of new commands that a device turns away when it ends; an initiator may send them again at once."""


class Queue:
    """What waits on one ring.

    Args:
        ring: The ring.

    Attributes:
        pending: The commands that a worker may begin, the first one first. Workers take them out; the object stays.
        parked: Those that are kept from workers and emulation; None while none are.
    """

    def __init__(self, ring: _native.Ring) -> None:
        self.pending: deque[_native.Command] = deque()
        self._ring = ring
        self.parked: deque[_native.Command] | None = None
        self._pieces: dict[int, Piece] = {}

    def waiting(self) -> list[_native.Command]:
        """All that wait, but for pieces whose ranges are not free yet."""
        return [*self.pending, *(self.parked or ())]

    def has_more(self) -> bool:
        """Whether anything waits that is not parked."""
        return bool(self.pending or self._pieces)

    # Between the ring and here.

    def fetch(self) -> tuple[int, list[_native.TaskManagement]]:
        """Takes a batch out of the ring. Returns how many commands it had, and what is to be aborted.

        Raises:
            DeviceError: The device is over.
        """
        parked = self.parked
        commands, notices = self._ring.drain(BATCH, parked is not None)
        if self._pieces:
            self._grant()
        if parked is None:
            self.pending.extend(commands)
        else:
            for cmd in commands:
                # Those that have waited for others go on with the handler that is there.
                (parked if cmd.verb is None and cmd.piece is None else self.pending).append(cmd)
        return len(commands), notices

    def commit(self) -> bool:
        """Hands back what was answered. Returns whether commands may have waited for that, which are pending now.

        Raises:
            DeviceError: The device is over.
        """
        if not self._ring.commit():
            return False
        self.pending.extend(self._ring.ready())
        if self._pieces:
            self._grant()
        return True

    # Pieces of copies, which come from elsewhere.

    def enter(self, piece: Piece) -> tuple[int, bool]:
        """Puts a piece among the commands. Returns a token for `leave`, and whether it is pending.

        If it is not, others are at work on its range, and it comes after them.
        """
        token, granted = self._ring.enter(piece.offset, piece.length)
        if granted:
            self._add(piece)
        else:
            self._pieces[token] = piece
        return token, granted

    def withdraw(self, token: int) -> bool:
        """Takes a piece back, if it is not pending yet. Returns whether it was not."""
        return self._pieces.pop(token, None) is not None

    def leave(self, token: int) -> None:
        """A piece is over: others may have waited for its range, and come with the next `commit`."""
        self._ring.leave(token)

    def _grant(self) -> None:
        for token in self._ring.granted():
            piece = self._pieces.pop(token, None)
            if piece is not None:
                self._add(piece)

    def _add(self, piece: Piece) -> None:
        self.pending.append(cast("_native.Command", piece))

    # Commands that are kept from the handler.

    def park(self) -> None:
        """Keeps those that come from the workers, and from the emulation."""
        self.parked = deque()

    def unpark(self, *, whole: bool) -> None:
        """Lets those be begun that were parked.

        Args:
            whole: The handler gets commands before the emulation does.
        """
        parked, self.parked = self.parked or (), None
        # Each is answered, needs the handler, or has to wait for others and comes out of the ring again.
        with suppress(_errors.DeviceError):
            self.pending.extend([cmd for cmd in parked if whole or cmd.emulate()])

    def has_only_parked(self) -> bool:
        """Whether no command is on its way, or waits for another one, but for those that are parked."""
        return not self.has_more() and self._ring.in_flight == len(self.parked or ())

    # Commands that never have their turn.

    def abort(self, ids: list[int]) -> None:
        """Answers those of these that wait here, unless they go on when they are aborted."""
        for cmd in self.waiting():
            if cmd.id in ids and not cmd.answered and not cmd.detach():
                self._remove(cmd)
                cmd.fail(*ABORTED)

    def turn_away(self, commands: Iterable[_native.Command]) -> None:
        """Answers some that wait here: nothing was done for them, so they may come again."""
        for cmd in commands:
            self._remove(cmd)
            cmd.fail(*BUSY)

    def close(self) -> None:
        """Answers all that wait, here and in the ring, so that they come again.

        Raises:
            DeviceError: The device is over, and nothing can be answered.
        """
        self._refuse([*self.pending, *self._pieces.values()])
        self.pending.clear()
        self._pieces.clear()
        for _ in range(LAST_BATCHES):
            # Past the emulation, which would say of some (IMMED) that they are under way.
            commands, _ = self._ring.drain(BATCH, True)
            self._refuse(commands)
            if not self._ring.pending():
                break

    def _refuse(self, commands: Iterable[_native.Command | Piece]) -> None:
        for cmd in commands:
            cmd.fail(*BUSY)
        # Commands that waited for those come out now, and those that waited for them.
        while self._ring.commit():
            for cmd in self._ring.ready():
                cmd.fail(*BUSY)

    def _remove(self, cmd: _native.Command) -> None:
        (self.pending if cmd in self.pending else self.parked or self.pending).remove(cmd)
