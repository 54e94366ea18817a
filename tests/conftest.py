"""What all tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.lab.plugin"]


class Log(logging.Handler):
    """What the package logged at WARNING and above. A test takes what it expects; anything left fails it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        # As handlers do that write later, or elsewhere: the record is kept, with all that hangs on it.
        self.records.append(record)

    def expect(self, text: str) -> str:
        """Takes the first record whose message contains `text`, and returns all of the message."""
        for record in self.records:
            if text in record.getMessage():
                self.records.remove(record)
                return record.getMessage()
        raise AssertionError(f"nothing was logged about {text!r}, only {[r.getMessage() for r in self.records]}")


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    log = Log()
    logger = logging.getLogger("tcmu_rs")
    logger.addHandler(log)
    try:
        yield log
    finally:
        logger.removeHandler(log)
    assert not log.records, f"logged unasked: {[record.getMessage() for record in log.records]}"
