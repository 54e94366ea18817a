"""Test a handler in milliseconds: no root, no kernel module, no sleeping.

```python
async with tcmu_rs.testing.simulated(MyHandler()) as disk:
    await disk.write(4096, b"x" * 4096)
    assert await disk.read(4096, 4096) == b"x" * 4096
    reply = await disk.scsi(bytes([0x12, 0, 0, 0, 96, 0]), data_in=96)
```

The simulator plays the kernel's side of the ring in a memory file; from the ring up everything is the code that
serves real devices. It fills Data-In with a pattern first and overwrites the data area after each answer, and fails
the test when a byte was never written, a command was answered twice, or the ring was handled against the rules.

`check_block_handler` checks a handler against every obligation of its interface, and says which one is broken.

Modules beside this: `model` compares a handler with a bytearray by Hypothesis, `faults` is a disk that misbehaves on
command, `crash` looks for what a handler loses when the power fails.
"""

from ._conformance import BrokenObligation, Obligation, check_block_handler
from ._simulated import (
    ABORT_TASK,
    CAP_KEEP_BUF,
    CAP_OOOC,
    CAP_READ_LEN,
    CAP_TMR,
    LUN_RESET,
    Reply,
    SimulatedDisk,
    simulated,
)

__all__ = [
    "ABORT_TASK",
    "CAP_KEEP_BUF",
    "CAP_OOOC",
    "CAP_READ_LEN",
    "CAP_TMR",
    "LUN_RESET",
    "BrokenObligation",
    "Obligation",
    "Reply",
    "SimulatedDisk",
    "check_block_handler",
    "simulated",
]
