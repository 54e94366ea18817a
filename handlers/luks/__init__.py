"""An encrypted disk in the format of LUKS, which cryptsetup opens too: `luks:PATH`."""

from ._errors import LuksError, WrongPassphraseError
from .handler import LuksHandler, format_luks

__all__ = ["LuksError", "LuksHandler", "WrongPassphraseError", "format_luks"]
