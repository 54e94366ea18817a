"""Who may do something alone, in whatever task."""

from __future__ import annotations

import trio


class Turn:
    """A lock that no task owns: what has it may go on in another task (`BlockHandler.taskless`).

    First come, first served.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def take(self) -> None:
        """Takes it: at once if nobody has it, without a pass of the loop; else when it is given back."""
        if self._taken:
            # Who gives it back leaves it to the first that waits.
            await self._waiting.park()
        self._taken = True

    def give_back(self) -> None:
        """Lets the next one have it."""
        if self._waiting:
            self._waiting.unpark()
        else:
            self._taken = False

    async def __aenter__(self) -> None:
        """As `take`."""
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        """As `give_back`."""
        self.give_back()
