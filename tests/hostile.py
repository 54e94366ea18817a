"""What the tests of odd input share."""

from __future__ import annotations

from tcmu_rs import Handler


async def open_and_close(handler: Handler) -> None:
    """Opens what may not be there: if it is refused, then with a text."""
    try:
        await handler.open()
    except (OSError, ValueError, TypeError) as error:
        assert str(error)
    else:
        await handler.aclose()
