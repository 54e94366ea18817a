"""What is wrong with an image."""


class Qcow2Error(ValueError):
    """The image is damaged, or asks for what is not supported; the text says what."""
