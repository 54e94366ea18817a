"""A server whose own machine uses its disk: what keeps the kernel from waiting for itself.

When memory is short the kernel writes dirty pages to our disk, and waits for us; whatever we then wait for must not be
memory that comes free by that very write. So the process tells the kernel that it is part of the way to storage, keeps
what it has touched in memory, and is not what the OOM killer takes first.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

_log = logging.getLogger("tcmu_rs")

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def protect_memory(*, lock: bool = True) -> list[str]:
    """Makes this process fit to serve disks that its own machine mounts. `tcmu-rs attach` and `daemon` do it, the
    second part with `--lock-memory`.

    To be called before threads are started: they inherit it.

    - Its memory allocations do not wait for file systems and block devices, and its writes are not slowed down with
      those of others (prctl(2), `PR_SET_IO_FLUSHER`; Linux 5.6).
    - What it has touched stays in memory (mlockall(2) with `MCL_ONFAULT`): code, heap and stacks are neither swapped
      out to its own disk nor dropped and read again. Untouched parts cost nothing. The kernel looks for pages of a
      device's data area that are not there yet, and logs `Invalid addr to data page mapping`, which is harmless.
    - The OOM killer spares it (`oom_score_adj`).

    Args:
        lock: Do the second of these.

    Returns:
        What could not be had, in words; without root that is all of it.
    """
    problems = []
    if _LIBC.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        problems.append(f"PR_SET_IO_FLUSHER: {os.strerror(ctypes.get_errno())}")
    if lock and _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        problems.append(f"mlockall: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        problems.append(f"oom_score_adj: {error.strerror}")
    for problem in problems:
        _log.info("memory is not protected: %s", problem)
    return problems
