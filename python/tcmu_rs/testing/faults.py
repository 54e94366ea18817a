"""A disk that misbehaves on command: a layer over any block handler.

```python
disk = Faulty(MyHandler(), [Rule(on="write", skip=9, times=1, error=errno.EIO), Rule(on="read", delay=0.5)])
async with simulated(disk) as initiator:
    ...
assert [fault.verb for fault in disk.faults] == ["write"]
```

The first rule that fires decides what happens to an operation. What fires depends on the order of operations and on the
seed, and on nothing else: the same operations meet the same faults. All waiting is trio's, so a `MockClock` makes it
short.

On the command line it is the handler `faults`, with rules of the same words:

```console
$ tcmu-rs attach faults:file:/var/tmp/disk.img -o 'rules=write skip=9 times=1 error=EIO; read delay=0.5'
```
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import trio

from .. import _registry
from .._errors import ScsiError
from .._handler import BlockHandler, ExtentState, Options
from .._layers import Lower
from .._native import IoVec

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Fault", "Faulty", "Rule", "Store", "parse_rules"]

logger = logging.getLogger(__name__)

VERBS = ("read", "write", "flush", "discard", "write_zeroes")


class Store(Enum):
    """How much of an operation reaches the storage below."""

    ALL = "all"
    TORN = "torn"
    """Some of its blocks: of a write any, of a discard or of zeroes the first ones."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Rule:
    """To which operations something happens, and what.

    An operation is a call of a method of the handler; a command of the initiator may be several.

    Attributes:
        on: Verbs, separated by commas: read, write, flush, discard, write_zeroes. Empty for all.
        start: First byte of a range: only operations that touch it count, and a flush touches everything.
        stop: The byte behind the range; None for the end of the disk.
        skip: How many operations that count pass before it fires.
        times: How often it fires; None for ever.
        probability: That it fires when it could.
        delay: Seconds to wait first.
        hang: Never answer; a cancelled operation ends.
        store: How much is done. An operation that does less and has no error succeeds all the same: a lie.
        flip: Turn one bit of what was read.
        error: Fail with this after all that: an errno, or a `ScsiError` or other exception to raise.
        crash: Kill this process after all that, or do what `Faulty` was told to do instead.

    Raises:
        ValueError: There is no such verb, or a number cannot be.
    """

    on: str = ""
    start: int = 0
    stop: int | None = None
    skip: int = 0
    times: int | None = None
    probability: float = 1.0
    delay: float = 0.0
    hang: bool = False
    store: Store = Store.ALL
    flip: bool = False
    error: int | Exception | None = None
    crash: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if unknown := self.verbs - set(VERBS):
            raise ValueError(f"there is no operation {', '.join(sorted(unknown))}: there are {', '.join(VERBS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"a probability of {self.probability} is not between 0 and 1")
        if math.isnan(self.delay):
            raise ValueError("a delay is a number of seconds")
        if self.flip and "read" not in self.verbs:
            raise ValueError("a bit is turned of what was read, and this is about other operations")
        if min(self.start, self.skip, self.times or 0, self.delay) < 0:
            raise ValueError(f"{self}: no number in it can be negative")
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"the range from {self.start} to {self.stop} is empty")

    @property
    def verbs(self) -> frozenset[str]:
        """What `on` says."""
        return frozenset(self.on.split(",")) if self.on else frozenset(VERBS)

    def counts(self, verb: str, offset: int, length: int) -> bool:
        """Whether an operation is one of those that the rule is about."""
        if verb not in self.verbs:
            return False
        return verb == "flush" or (offset + length > self.start and (self.stop is None or offset < self.stop))


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to an operation.

    Attributes:
        number: Of the operation, from 0.
        verb: What it was.
        offset: Its first byte.
        length: Its bytes.
        rule: What made it happen.
    """

    number: int
    verb: str
    offset: int
    length: int
    rule: Rule


def kill_process() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Faulty(BlockHandler):
    """Passes everything down, but for what rules say.

    Args:
        lower: Opened and closed with this.
        rules: The first one that fires is applied. May be changed while it is served, see `rules`.
        seed: Chooses by probability, and blocks and bits.
        on_crash: What a crash is instead of SIGKILL. When it returns, the device is dead: nothing more
            reaches the storage below, and nothing is answered.

    Attributes:
        faults: What was done so far, in order.
    """

    def __init__(
        self,
        lower: BlockHandler,
        rules: Sequence[Rule] = (),
        *,
        seed: int = 0,
        on_crash: Callable[[], object] = kill_process,
    ) -> None:
        self.persistent = lower.persistent
        self._lower = Lower(lower)
        self._seed = seed
        self._on_crash = on_crash
        self._operations = 0
        self._dead = False
        self.faults: list[Fault] = []
        self.rules = tuple(rules)

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the specification of the disk below, `-o rules=TEXT` what to do to it (see `parse_rules`).

        `-o seed=N` chooses another sequence of chances. All other options are for the disk below.
        """
        extra = dict(options.extra)
        rules = parse_rules(extra.pop("rules", ""))
        seed = extra.pop("seed", "0")
        if not seed.isdecimal():
            raise ValueError(f"seed is {seed!r}; it is a number")
        name, config = _registry.parse_spec(config)
        below = dataclasses.replace(options, extra=MappingProxyType(extra))
        return cls(_registry.load(name).from_config(config, below), rules, seed=int(seed))

    @classmethod
    def absolute_config(cls, config: str) -> str:
        """That of the disk below."""
        name, below = _registry.parse_spec(config)
        return f"{name}:{_registry.load(name).absolute_config(below)}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules in force. Setting them starts their counts anew."""
        return self._rules

    @rules.setter
    def rules(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._counted = [0] * len(self._rules)
        self._fired = [0] * len(self._rules)

    async def open(self) -> None:
        """Opens what is below, and looks like it."""
        await self._lower.open()
        lower, handler = self._lower, self._lower.handler
        self.size = lower.size
        self.block_size = lower.block_size
        self.physical_block_size = handler.physical_block_size
        self.max_in_flight = lower.max_in_flight
        self.read_only = not lower.writable
        self.rotational = handler.rotational
        self.removable = handler.removable
        self.native_fua = handler.native_fua
        self.fills_reads = lower.fills_reads
        self.discard_zeroes = lower.discard_zeroes
        self.discard_granularity = handler.discard_granularity
        self.max_atomic_write = handler.max_atomic_write
        self.identity = handler.identity
        self.can_flush = lower.has_cache
        self.can_discard = lower.can_discard
        self.can_write_zeroes = lower.can_write_zeroes
        self.can_extents = lower.can_extents
        self.can_set_size = lower.can_set_size

    async def aclose(self) -> None:
        """Closes what is below."""
        await self._lower.aclose()

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads, or not."""
        fault, random = await self._begin("read", offset, iov.nbytes)
        if fault is None:
            await self._lower.read(offset, iov)
            await self._outlive()
            return
        if fault.rule.store is Store.ALL:
            await self._lower.read(offset, iov)
        else:
            iov.copy_from(random.randbytes(iov.nbytes))
        if fault.rule.flip:
            data = bytearray(iov.tobytes())
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            iov.copy_from(data)
        await self._end(fault)

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        """Writes, or not."""
        fault, random = await self._begin("write", offset, iov.nbytes)
        if fault is None:
            await self._lower.write(offset, iov, fua=fua)
            await self._outlive()
            return
        if fault.rule.store is Store.ALL:
            await self._lower.write(offset, iov, fua=fua)
        elif fault.rule.store is Store.TORN:
            blocks = range(iov.nbytes // self.block_size)
            lost = random.choice(blocks)
            for block in blocks:
                if block != lost and random.random() < 0.5:
                    await self._outlive()
                    at = block * self.block_size
                    await self._lower.write(offset + at, iov.slice(at, at + self.block_size), fua=fua)
        await self._end(fault)

    async def flush(self) -> None:
        """Flushes, or not."""
        fault, _ = await self._begin("flush", 0, self.size)
        if fault is None or fault.rule.store is Store.ALL:
            await self._lower.flush()
        if fault is None:
            await self._outlive()
        else:
            await self._end(fault)

    async def discard(self, offset: int, length: int) -> None:
        """Discards, or not."""
        await self._clear("discard", offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes, or not."""
        await self._clear("write_zeroes", offset, length)

    async def extents(self, offset: int, length: int) -> Sequence[tuple[int, ExtentState]]:
        """Passes down: no rule is about it."""
        await self._outlive()
        extents = await self._lower.extents(offset, length)
        await self._outlive()
        return extents

    async def set_size(self, size: int) -> None:
        """Passes down: no rule is about it."""
        await self._outlive()
        try:
            await self._lower.set_size(size)
        finally:
            self.size = self._lower.size
        await self._outlive()

    async def _clear(self, verb: str, offset: int, length: int) -> None:
        call = self._lower.discard if verb == "discard" else self._lower.write_zeroes
        fault, random = await self._begin(verb, offset, length)
        if fault is None:
            await call(offset, length)
            await self._outlive()
            return
        unit = max(self.block_size, self.discard_granularity)
        if fault.rule.store is Store.TORN:
            length = random.randrange(length // unit) * unit if length > unit else 0
        if length and fault.rule.store is not Store.NONE:
            await call(offset, length)
        await self._end(fault)

    async def _begin(self, verb: str, offset: int, length: int) -> tuple[Fault | None, Random]:
        """Finds out what shall happen, and waits as long as that says."""
        await self._outlive()
        number = self._operations
        self._operations += 1
        fired, random = self._firing(verb, offset, length)
        if fired is None:
            return None, random
        fault = Fault(number, verb, offset, length, fired)
        self.faults.append(fault)
        logger.info("operation %d, %s of %d bytes at %d: %s", number, verb, length, offset, fired)
        if fired.delay:
            await trio.sleep(fired.delay)
            await self._outlive()
        if fired.hang:
            await trio.sleep_forever()
        return fault, random

    async def _outlive(self) -> None:
        """Never returns once there was a crash, whatever was under way then."""
        if self._dead:
            await trio.sleep_forever()

    def _firing(self, verb: str, offset: int, length: int) -> tuple[Rule | None, Random]:
        found: tuple[Rule | None, Random] = None, Random(0)
        for index, rule in enumerate(self._rules):
            if not rule.counts(verb, offset, length):
                continue
            count = self._counted[index]
            # Those behind the one that fires count, too: what they do must not depend on its chances.
            self._counted[index] += 1
            if found[0] is not None or count < rule.skip or self._fired[index] == rule.times:
                continue
            random = Random(f"{self._seed} {index} {count}")
            if random.random() < rule.probability:
                self._fired[index] += 1
                found = rule, random
        return found

    async def _end(self, fault: Fault) -> None:
        """Fails or crashes, if the rule says so."""
        await self._outlive()
        rule = fault.rule
        if rule.crash:
            self._dead = True
            self._on_crash()
            await trio.sleep_forever()
        if isinstance(rule.error, int):
            raise OSError(rule.error, f"as told: {os.strerror(rule.error)}")
        if rule.error is not None:
            # The one that was given must not collect the tracebacks of all.
            raise rule.error.with_traceback(None)


def parse_rules(text: str) -> list[Rule]:
    """Reads rules as the command line has them: words, with a semicolon between one rule and the next.

    A rule begins with verbs (`write`, `read,write`, `any`). The other words are the attributes of `Rule`:
    `skip=9`, `times=1`, `probability=0.01`, `delay=0.5`, `hang`, `store=torn`, `store=none`, `flip`, `crash`; then
    `range=1M-2M` for `start` and `stop`, `error=ENOSPC` for an errno, and `error=3/11/00` for sense key, ASC and ASCQ
    in hexadecimal numbers.

    Raises:
        ValueError: It means nothing; the message says what would.
    """
    return [_parse_rule(part.split()) for part in text.split(";") if part.split()]


def _parse_rule(words: list[str]) -> Rule:
    text = " ".join(words)
    fields: dict[str, Any] = {"on": "" if words[0] == "any" else words[0]}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        read = _WORDS.get(name)
        if read is None or bool(equals) != (name not in _FLAGS):
            known = [f"{known}=…" if known not in _FLAGS else known for known in _WORDS]
            raise ValueError(f"{word!r} in the rule {text!r} means nothing; there are {', '.join(known)}")
        try:
            fields.update(read(value))
        except ValueError as error:
            raise ValueError(f"{word!r} in the rule {text!r}: {error}") from None
    try:
        return Rule(**fields)
    except ValueError as error:
        raise ValueError(f"in the rule {text!r}: {error}") from None


def _parse_range(text: str) -> dict[str, int | None]:
    start, dash, stop = text.partition("-")
    if not dash:
        raise ValueError("a range is two numbers of bytes: 1M-2M, 4096-, -64K")
    return {"start": _parse_size(start) if start else 0, "stop": _parse_size(stop) if stop else None}


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text)
    if not match:
        raise ValueError(f"{text!r} is not a number of bytes, such as 4096 or 1M")
    return int(match[1]) << " KMGT".index(match[2] or " ") * 10


def _parse_error(text: str) -> dict[str, int | Exception]:
    if match := re.fullmatch(r"([0-9a-fA-F]{1,2})/([0-9a-fA-F]{1,2})/([0-9a-fA-F]{1,2})", text):
        key, asc, ascq = (int(part, 16) for part in match.groups())
        if key > 0xF:
            raise ValueError("there is no such sense key")
        return {"error": ScsiError("as told", key=key, asc=asc, ascq=ascq)}
    number = getattr(errno, text, None)
    if not text.startswith("E") or not isinstance(number, int):
        raise ValueError("an error is the name of an errno, such as EIO, or a sense code, such as 3/11/00")
    return {"error": number}


_WORDS: Mapping[str, Callable[[str], Mapping[str, Any]]] = MappingProxyType(
    {
        "skip": lambda value: {"skip": int(value)},
        "times": lambda value: {"times": int(value)},
        "probability": lambda value: {"probability": float(value)},
        "delay": lambda value: {"delay": float(value)},
        "range": _parse_range,
        "store": lambda value: {"store": Store(value)},
        "error": _parse_error,
        "hang": lambda _: {"hang": True},
        "flip": lambda _: {"flip": True},
        "crash": lambda _: {"crash": True},
    }
)
_FLAGS = frozenset({"hang", "flip", "crash"})
