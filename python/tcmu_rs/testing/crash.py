"""Power cuts: whether what a handler has acknowledged is there afterwards.

```python
async def test_power_cuts() -> None:
    empty = Image(1 << 20)
    await check_power_cuts(lambda medium: MyLayer(MediumDisk(medium)), empty, seed=1)
```

A handler works on a `Medium`, storage with a volatile cache that records every change and every sync. Power is cut at
many places of that record, while the handler opens and closes, too. Of what was not durable then any subset of the
512-byte sectors has survived. The handler is opened on each such image and has to give:

- of what was acknowledged before a flush that has completed (or with FUA, or by a handler without `flush`): that, or
  something newer;
- of everything else the old or the new, sector by sector, and never anything else;
- the same again when it is opened again, whether or not power was cut while it recovered.

Then it works on, on an image that a power cut has left, for as many lives as are asked for.

Handlers that sit on another get a `MediumDisk`. Handlers of files get a real one, whatever system calls they use; that
takes root and FUSE:

```python
@contextmanager
def serve(medium):
    with recorded_file(medium) as path:
        yield MyFileHandler(path)
```

A handler whose own file access can be replaced may get the `Medium` itself, which is faster.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random

import trio

from .._handler import BlockHandler
from .._layers import Lower
from .._native import IoVec
from ._fuse import recorded_file
from ._medium import KEPT, SECTOR, Change, Cut, Image, Mark, Medium, MediumDisk, Sync

__all__ = [
    "SECTOR",
    "Change",
    "Cut",
    "Image",
    "LostWrite",
    "Mark",
    "Medium",
    "MediumDisk",
    "Summary",
    "Sync",
    "check_power_cuts",
    "recorded_file",
]

Serve = Callable[[Medium], BlockHandler | AbstractContextManager[BlockHandler]]
"""Makes a handler, not open yet, whose storage is the medium."""


class LostWrite(AssertionError):
    """After a power cut the disk has what it must not have, or does not open.

    Attributes:
        image: What the power cut left: `image.save(path)` makes a file of it.
        cut: Where it was.
        history: What the storage had seen, up to the cut.
    """

    def __init__(self, text: str, image: Image, cut: Cut, history: list[Change | Sync | Mark]) -> None:
        super().__init__(text)
        self.image = image
        self.cut = cut
        self.history = history


@dataclass
class Summary:
    """What was tried.

    Attributes:
        lives: How often the handler worked until its power was cut.
        cuts: Power cuts that were looked at.
        recoveries_cut: Those of them that struck while the handler recovered from another.
        writes: Commands that changed something.
        flushes: Flushes.
    """

    lives: int = 0
    cuts: int = 0
    recoveries_cut: int = 0
    writes: int = 0
    flushes: int = 0


@dataclass(slots=True)
class _Version:
    """What one command made of one sector; times are places in the history.

    Attributes:
        content: The bytes, or None if nobody knows.
        start: When the command was sent.
        end: When it had succeeded or failed.
        good: Whether it has succeeded.
        durable: When this was durable at the latest.
    """

    content: bytes | None
    start: int
    end: int | None = None
    good: bool = False
    durable: int | None = None


@dataclass
class _Model:
    """What may be on the disk: for each sector what was there, and every command that changed it since."""

    base: bytes
    caches: bool
    versions: dict[int, list[_Version]] = field(default_factory=dict)

    def begin(self, offset: int, contents: list[bytes | None], now: int) -> list[_Version]:
        versions = [_Version(content, now) for content in contents]
        for number, version in enumerate(versions, offset // SECTOR):
            self.versions.setdefault(number, []).append(version)
        return versions

    def end(self, versions: list[_Version], now: int, *, durable: bool) -> None:
        for version in versions:
            version.end, version.good = now, True
            if durable or not self.caches:
                version.durable = now

    def fail(self, versions: list[_Version], now: int) -> None:
        for version in versions:
            version.end = now

    def flushed(self, start: int, end: int) -> None:
        """A flush has made durable what had succeeded when it was sent."""
        for versions in self.versions.values():
            for version in versions:
                if version.good and version.durable is None and version.end is not None and version.end < start:
                    version.durable = end

    def allowed(self, sector: int, now: int) -> list[bytes | None]:
        """What a power cut after `now` events may leave in a sector."""
        started = [version for version in self.versions.get(sector, ()) if version.start < now]
        durable = [version for version in started if version.durable is not None and version.durable < now]
        return self._newest(sector, started, durable)

    def readable(self, sector: int, start: int) -> list[bytes | None]:
        """What a read that was sent at `start` may return."""
        versions = self.versions.get(sector, [])
        done = [version for version in versions if version.good and version.end is not None and version.end < start]
        return self._newest(sector, versions, done)

    def _newest(self, sector: int, started: list[_Version], final: list[_Version]) -> list[bytes | None]:
        """Everything but what was over before something began that is certain."""
        since = max((version.start for version in final), default=-1)
        found = [version.content for version in started if version.end is None or version.end >= since]
        return found if final else [self.base[sector * SECTOR : (sector + 1) * SECTOR], *found]

    def wrong(self, found: bytes, allowed: Callable[[int], list[bytes | None]], first: int = 0) -> str | None:
        """Says which sector has what it must not have."""
        base = self.base[first * SECTOR : first * SECTOR + len(found)]
        for at in range(len(found) // SECTOR):
            content = found[at * SECTOR : (at + 1) * SECTOR]
            if first + at in self.versions:
                choices = allowed(first + at)
                if None in choices or content in choices:
                    continue
            else:
                choices = [base[at * SECTOR : (at + 1) * SECTOR]]
                if content == choices[0]:
                    continue
            may = " or ".join(sorted({_describe(choice) for choice in choices}))
            return f"sector {first + at} has {_describe(content)} instead of {may}"
        return None


def _describe(content: bytes | None) -> str:
    if content is None:
        return "anything"
    if not any(content):
        return "zeroes"
    name = content[:24].rstrip(b"\0")
    return f"{name.decode()!r}" if name.isascii() and name.startswith(b"<") else f"{content[:8].hex()}…"


class _Life:
    """A handler at work on a medium, and the model of what it owes."""

    def __init__(self, handler: Lower, medium: Medium, random: Random, summary: Summary, serial: int) -> None:
        self.handler = handler
        self.medium = medium
        self.random = random
        self.summary = summary
        self.serial = serial
        self.model: _Model

    async def begin(self) -> None:
        self.model = _Model(await _read(self.handler, 0, self.handler.size), self.handler.has_cache)

    async def work(self, operations: int, tasks: int) -> None:
        """Sends random commands from several tasks, with a few places that are written again and again."""
        blocks = self.handler.size // self.handler.block_size
        hot = [self.random.randrange(blocks) for _ in range(6)]
        async with trio.open_nursery() as nursery:
            for task in range(tasks):
                random = Random(self.random.random())
                nursery.start_soon(self._commands, random, hot, operations // tasks, f"{self.serial}.{task}")

    async def _commands(self, random: Random, hot: list[int], count: int, name: str) -> None:
        block = self.handler.block_size
        blocks = self.handler.size // block
        kinds = ["write"] * 10 + ["fua", "flush", "flush", "read", "read", "wait"]
        kinds += ["write_zeroes"] * self.handler.can_write_zeroes + ["discard"] * 2 * self.handler.can_discard
        for number in range(count):
            kind = random.choice(kinds)
            length = random.choice([1, 1, 2, 8, 16, random.randint(1, 64)])
            first = min(random.choice(hot) + random.randint(0, 8), blocks - 1) if random.random() < 0.7 else None
            first = random.randrange(blocks) if first is None else first
            length = min(length, blocks - first)
            await self._command(random, kind, first * block, length * block, f"{name}.{number}")

    async def _command(self, random: Random, kind: str, offset: int, length: int, name: str) -> None:
        handler, mark = self.handler, self.medium.mark
        if kind == "wait":
            # For what handlers do in the background.
            await trio.sleep(random.choice([0, 0, 0.003]))
        elif kind == "flush":
            self.summary.flushes += 1
            start = mark(f"{name} flush")
            await handler.flush()
            self.model.flushed(start, mark(f"{name} flushed"))
        elif kind == "read":
            start = mark(f"{name} read {length} at {offset}")
            found = await _read(handler, offset, length)
            wrong = self.model.wrong(found, lambda sector: self.model.readable(sector, start), offset // SECTOR)
            if wrong:
                raise AssertionError(f"{name}: before any power cut, {wrong}")
        else:
            self.summary.writes += 1
            contents: list[bytes | None]
            if kind in ("write", "fua"):
                contents = [*_contents(random, name, length // SECTOR)]
            else:
                zeroed = kind == "write_zeroes" or handler.discard_zeroes
                contents = [bytes(SECTOR) if zeroed else None] * (length // SECTOR)
            versions = self.model.begin(offset, contents, mark(f"{name} {kind} {length} at {offset}"))
            try:
                if kind in ("write", "fua"):
                    data = b"".join(content for content in contents if content is not None)
                    await handler.write(offset, IoVec([data]), fua=kind == "fua")
                else:
                    await getattr(handler, kind)(offset, length)
            except BaseException:
                self.model.fail(versions, mark(f"{name} failed"))
                raise
            self.model.end(versions, mark(f"{name} done"), durable=kind == "fua")


def _contents(random: Random, name: str, sectors: int) -> list[bytes]:
    """Sectors that tell who wrote them, some of which can be compressed."""
    kind = random.choice(["noise", "text", "zero"] if sectors > 1 else ["noise", "text"])
    found = []
    for sector in range(sectors):
        label = f"<{name}/{sector}>".encode().ljust(24, b"\0")
        rest = SECTOR - len(label)
        if kind == "noise":
            found.append(label + random.randbytes(rest))
        elif kind == "text" or sector % 2:
            found.append(label + (label * 21)[:rest])
        else:
            found.append(bytes(SECTOR))
    return found


async def _read(handler: Lower, offset: int, length: int) -> bytes:
    data = bytearray(length)
    step = 1 << 18
    for at in range(0, length, step):
        with memoryview(data)[at : at + step] as part:
            await handler.read(offset + at, IoVec([part]))
    return bytes(data)


@asynccontextmanager
async def _opened(serve: Serve, medium: Medium) -> AsyncIterator[Lower]:
    served = serve(medium)
    with nullcontext(served) if isinstance(served, BlockHandler) else served as handler:
        lower = Lower(handler)
        medium.mark("open")
        await lower.open()
        medium.mark("opened")
        try:
            yield lower
        finally:
            with trio.CancelScope(shield=True):
                medium.mark("close")
                await lower.aclose()
                medium.mark("closed")


async def check_power_cuts(
    serve: Serve,
    image: Image,
    *,
    seed: int = 0,
    lives: int = 4,
    cuts: int = 25,
    operations: int = 60,
    tasks: int = 3,
    garbage: float = 0.0,
    spared: Iterable[int] = (),
    judge: Callable[[Image], object] | None = None,
) -> Summary:
    """Lets a handler work, cuts its power in many places, and looks at what it makes of what is left.

    The same seed gives the same commands. Their order among each other, and so what exactly is found, repeats only with
    one task, and if the handler itself has no threads.

    Args:
        serve: Makes a handler, not open yet, whose storage is the medium; or a context manager that yields one.
        image: What the storage holds at first; the handler must open on it. A disk of a few hundred KiB finds most.
        seed: Chooses commands, places and sectors.
        lives: How often the handler works, each time on what the last power cut has left.
        cuts: Power cuts to look at in each life.
        operations: Commands in each life.
        tasks: How many of them run at once, `max_in_flight` of the handler permitting.
        garbage: The share of unsynced sectors that hold neither the old nor the new. Only handlers that
            never overwrite what is in use, and have checksums for the rest, stand that.
        spared: Sectors that are never garbage: those of which the handler's format assumes it.
        judge: Called with each image that the handler has recovered and closed; raises if it finds fault with it.

    Raises:
        LostWrite: The handler lost something, or has something that nobody wrote, or does not open.
    """
    summary = Summary()
    for life in range(lives):
        random = Random(f"{seed} {life}")
        summary.lives += 1
        medium = Medium(image)
        async with _opened(serve, medium) as handler:
            work = _Life(handler, medium, random, summary, life)
            await work.begin()
            await work.work(operations, min(tasks, handler.max_in_flight))
            end = medium.mark("all done")
        # Who closes its storage leaves nothing behind.
        work.model.flushed(end, medium.mark("closed, and so flushed"))
        left = []
        for cut in _choose_cuts(random, medium, cuts, garbage, frozenset(spared)):
            found = medium.after(cut)
            await _recover(serve, found, work.model, cut, medium, random, summary, judge)
            left.append(found)
        image = random.choice(left)
    return summary


def _choose_cuts(random: Random, medium: Medium, count: int, garbage: float, spared: frozenset[int]) -> list[Cut]:
    """Places right after something that the storage saw, or that a caller was told: elsewhere nothing is new."""
    places = list(range(1, len(medium.history) + 1))
    chosen = places if len(places) <= count else sorted(random.sample(places, count))
    return [Cut(place, random.choice(KEPT), random.getrandbits(32), garbage, spared) for place in chosen]


async def _recover(
    serve: Serve,
    image: Image,
    model: _Model,
    cut: Cut,
    before: Medium,
    random: Random,
    summary: Summary,
    judge: Callable[[Image], object] | None,
) -> None:
    """Opens what a power cut has left, sometimes after a second one in the middle of that, and looks at it."""
    summary.cuts += 1
    medium = Medium(image)
    second: Cut | None = None
    try:
        async with _opened(serve, medium) as handler:
            opened = len(medium.history)
            first = await _look(handler, model, cut.after)
        if judge is not None:
            judge(medium.image)
        changes = [place for place, event in enumerate(medium.history[:opened]) if isinstance(event, Change)]
        if changes:
            summary.recoveries_cut += 1
            second = replace(
                cut, after=random.choice(changes) + 1, kept=random.choice(KEPT), seed=random.getrandbits(32)
            )
            image = medium.after(second)
            medium = Medium(image)
        else:
            medium = Medium(medium.image)
        async with _opened(serve, medium) as handler:
            again = await _look(handler, model, cut.after)
        if again != first:
            at = next(at for at in range(0, len(first), SECTOR) if first[at : at + SECTOR] != again[at : at + SECTOR])
            was, now_is = _describe(first[at : at + SECTOR]), _describe(again[at : at + SECTOR])
            raise AssertionError(f"sector {at // SECTOR} had {was} when it was opened first, and then {now_is}")
        if judge is not None:
            judge(medium.image)
    except Exception as error:
        history = before.history[: cut.after]
        last = next((event.text for event in reversed(history) if isinstance(event, Mark)), "the beginning")
        where = f"{cut}, after '{last}'" + (f", and then {second} while it recovered" if second else "")
        raise LostWrite(f"{where}: {error}", image, cut, history) from error


async def _look(handler: Lower, model: _Model, now: int) -> bytes:
    if handler.size != len(model.base):
        raise AssertionError(f"the disk has {handler.size} bytes instead of {len(model.base)}")
    found = await _read(handler, 0, handler.size)
    if wrong := model.wrong(found, lambda sector: model.allowed(sector, now)):
        raise AssertionError(wrong)
    return found
