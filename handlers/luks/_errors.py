"""What is wrong with a container, or with a key."""


class LuksError(ValueError):
    """The container is damaged, or asks for what is not understood; the text says what."""


class WrongPassphraseError(LuksError):
    """No keyslot opens with this passphrase or key file."""
