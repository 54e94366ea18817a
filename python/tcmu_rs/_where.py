"""Where code is: the line at which a coroutine, a thread or an event loop waits, for people to read."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

_OURS = ("tcmu_rs._", "tcmu_rs.testing._simulated")
_TRIO = ("trio", "outcome")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_trio(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in _TRIO


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}()"


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine, from the outermost on."""
    while coroutine is not None:
        # Coroutines, generators that act as such, asynchronous generators.
        for frame_of, next_of in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")):
            frame = getattr(coroutine, frame_of, None)
            if frame is not None:
                yield frame
                coroutine = getattr(coroutine, next_of)
                break
        else:
            return


def await_point(coroutine: Any) -> str:
    """Says at which line a suspended coroutine waits: the innermost one outside of trio and this package.

    Returns:
        `FILE:LINE in FUNCTION()`, followed by the function of trio that is awaited there, if it is one; `unknown` if
        there is no frame to see.
    """
    found, inside = "unknown", ""
    for frame in _awaited(coroutine):
        if _is_trio(frame):
            inside = inside or frame.f_code.co_name
        elif found == "unknown" or not _module(frame).startswith(_OURS):
            found, inside = _place(frame), ""
    return f"{found}, which awaits trio's {inside}()" if inside else found


def thread_point(thread: int) -> str:
    """Says at which line a thread is.

    Args:
        thread: As from `threading.get_ident`.
    """
    frame = sys._current_frames().get(thread)
    return f"{_place(frame)}, in a thread" if frame is not None else "unknown"


def stack(thread: int) -> tuple[str, str]:
    """Where a thread is: the innermost line outside of trio and this package, and all of its stack as text."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "unknown", ""
    text = "".join(traceback.format_stack(frame))
    outer: FrameType | None = frame
    while outer is not None and (_is_trio(outer) or _module(outer).startswith((*_OURS, "threading"))):
        outer = outer.f_back
    return _place(outer or frame), text
