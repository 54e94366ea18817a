"""SCSI devices served to the Linux kernel from Python, under trio."""

from ._attach import AttachedDevice, attach, serve
from ._copy import Progress, copy
from ._domain import CopyDomain
from ._errors import (
    Busy,
    CopyError,
    DamagedFrameError,
    DeviceError,
    DeviceRemovedError,
    HardwareError,
    IllegalRequest,
    MediumError,
    MediumNotPresent,
    Miscompare,
    NotReady,
    OutOfSpace,
    RingCorruptError,
    ScsiError,
    TransferCancelled,
    WriteProtected,
)
from ._handler import BlockHandler, ExtentState, Handler, Identity, Options, blocking
from ._layers import Lower
from ._memory import protect_memory
from ._native import (
    AesXts,
    Command,
    IoVec,
    Transfer,
    ZstdFrames,
    __version__,
    debug_build,
    fallocate,
    fdatasync,
)
from ._registry import handler_below
from ._runtime import Device
from ._statistics import DeviceStatistics, LateCommand, Latency, VerbStatistics

if debug_build:
    import warnings

    warnings.warn("tcmu_rs._native is a debug build: many times slower than a release build", stacklevel=2)

__all__ = [
    "AesXts",
    "AttachedDevice",
    "BlockHandler",
    "Busy",
    "Command",
    "CopyDomain",
    "CopyError",
    "DamagedFrameError",
    "Device",
    "DeviceError",
    "DeviceRemovedError",
    "DeviceStatistics",
    "ExtentState",
    "Handler",
    "HardwareError",
    "Identity",
    "IllegalRequest",
    "IoVec",
    "LateCommand",
    "Latency",
    "Lower",
    "MediumError",
    "MediumNotPresent",
    "Miscompare",
    "NotReady",
    "Options",
    "OutOfSpace",
    "Progress",
    "RingCorruptError",
    "ScsiError",
    "Transfer",
    "TransferCancelled",
    "VerbStatistics",
    "WriteProtected",
    "ZstdFrames",
    "__version__",
    "attach",
    "blocking",
    "copy",
    "fallocate",
    "fdatasync",
    "handler_below",
    "protect_memory",
    "serve",
]
