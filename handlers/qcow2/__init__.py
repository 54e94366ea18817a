"""A disk in a qcow2 image, as QEMU uses them: `qcow2:PATH`; `zstd:PATH` is written compressed."""

from ._errors import Qcow2Error
from .handler import Qcow2Handler, ZstdHandler
from .storage import Storage
from .tools import create

__all__ = ["Qcow2Error", "Qcow2Handler", "Storage", "ZstdHandler", "create"]
