"""Text from strangers, for terminals."""


def printable(text: str) -> str:
    """The text without what a terminal would obey, a line or a column would end at, or UTF-8 does not have."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
