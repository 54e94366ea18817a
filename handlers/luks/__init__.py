"""An encrypted disk in the format of LUKS, which cryptsetup opens too: `luks:PATH`."""

from ._errors import LuksError, WrongPassphraseError
from .container import format_luks
from .handler import LuksHandler

__all__ = ["LuksError", "LuksHandler", "WrongPassphraseError", "format_luks"]
