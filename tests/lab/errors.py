"""What the lab raises."""


class LabError(Exception):
    """The lab itself failed; a job that fails is a `Result`, not an exception."""


class MissingError(LabError):
    """Something that the lab needs is not on this machine.

    Attributes:
        piece: What is missing.
        remedy: What to do about it.
    """

    def __init__(self, piece: str, remedy: str) -> None:
        super().__init__(f"the lab needs {piece}; {remedy}")
        self.piece = piece
        self.remedy = remedy


class BootError(LabError):
    """The guest did not get as far as starting the job; the message holds what was seen of it."""
