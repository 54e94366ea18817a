"""The log protocol of handlers/qcow2/FORMAT.md as a program on a disk that forgets: only the order of things.

The disk is made of sectors that hold any value. What was not synced when the power fails is, sector by sector, there or
not, or garbage. Commands, destaging, flushes and checkpoints are generators that a random scheduler interleaves;
each `yield` is a place where others run, or the power fails. Every rule of the protocol has a name, and can be left
out.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

CLUSTERS, BLOCKS = 6, 2
TABLES, WORDS = 2, 4  # words of a page; a table maps CLUSTERS // TABLES clusters
PLACES = 22  # each of two sectors; the first ones are the L1 page and the refcounts
FIRST_PLACE = 1 + -(-PLACES // WORDS)
HALF = 28  # sectors of half a log

RULES = {
    "verify": "the last record counts only if the runs that it names are there",
    "sync": "a flush is answered when its fdatasync has returned",
    "what it names": "a record that names runs is made durable with the whole file, and not alone",
    "in place": "so is one that is written after data in place",
    "one at a time": "the next record is written only when the fdatasync of the last one has returned",
    "plain first": "maps to plain clusters get into a record only when their data is durable",
    "no early reuse": "a freed place is used again only when the record that freed it is durable",
    "freed is not named": "a record names no run whose place it frees",
    "no early reuse of metadata": "one that held metadata only after the next checkpoint",
    "images": "a checkpoint's record has images of what it will write in place",
    "pieces again": "a checkpoint's record has all pieces that are not settled",
    "sync images": "pages are written in place when their images are durable",
    "sync state": "the old half is free when the new state is durable",
    "settle": "a record says whose older pieces count no more",
    "settled before pieces": "what a record settles is older than its own pieces",
    "drop if rewritten": "what was compressed is dropped if the cluster was written meanwhile",
    "finish first": "recovery finishes a checkpoint that was begun, before it begins another",
    "zero the end": "recovery zeroes the sector where the chain ended",
    "session": "records of an earlier life do not count",
}

GARBAGE = ("garbage",)
Step = Generator[None, None, None]


class Lost(AssertionError):
    """Something that was acknowledged is gone, or something is there that nobody wrote."""


class PowerCut(Exception):
    """In the middle of something."""


class Disk:
    """Sectors with a volatile cache."""

    def __init__(self) -> None:
        self.durable: dict[Any, Any] = {}
        self.pending: list[tuple[Any, Any] | None] = []
        self.synced = 0

    def write(self, sector: Any, value: Any) -> None:
        self.pending.append((sector, value))

    def read(self, sector: Any) -> Any:
        newest = (entry[1] for entry in reversed(self.pending) if entry is not None and entry[0] == sector)
        return next(newest, self.durable.get(sector))

    def sync(self) -> Step:
        """What was written before it began is durable when it has returned."""
        begin = self.synced + len(self.pending)
        yield
        count = max(begin - self.synced, 0)
        self.durable.update(entry for entry in self.pending[:count] if entry is not None)
        del self.pending[:count]
        self.synced += count

    def sync_alone(self, sectors: Container[Any]) -> Step:
        """Of what was written before it began these sectors are durable when it has returned, and no others."""
        begin = self.synced + len(self.pending)
        yield
        for number, entry in enumerate(self.pending[: max(begin - self.synced, 0)]):
            if entry is not None and entry[0] in sectors:
                self.durable[entry[0]] = entry[1]
                self.pending[number] = None

    def cut(self, random: Random) -> None:
        """The power fails."""
        share = random.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        versions: dict[Any, list[Any]] = {}
        for entry in self.pending:
            if entry is not None:
                versions.setdefault(entry[0], []).append(entry[1])
        for sector, values in versions.items():
            if random.random() < share:
                self.durable[sector] = random.choice([values[-1], random.choice(values)])
            elif random.random() < 0.1 and not _atomic(sector):
                self.durable[sector] = GARBAGE
        self.pending.clear()


def _atomic(sector: Any) -> bool:
    """The header's sector is written whole or not at all; and where data is overwritten in place there is no remedy."""
    return bool(sector == "header" or sector[0] == "plain")


@dataclass(eq=False)
class Blob:
    """A compressed cluster: known by its checksum."""

    content: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """A record; each of its sectors holds it and a number, so that a torn one is known."""

    session: int
    seq: int
    pages: dict[int, dict[int, Any]]
    settled: frozenset[int]
    extents: list[tuple[int, Blob]]
    pieces: dict[tuple[int, int], int]
    images: bool = False
    overwrote: bool = False

    @property
    def sectors(self) -> int:
        words = sum(len(page) for page in self.pages.values())
        return 1 + words // 8 + len(self.pieces) // 3


@dataclass
class Engine:
    """The handler."""

    disk: Disk
    random: Random
    missing: frozenset[str]
    thrifty: bool = False
    pages: dict[int, list[Any]] = field(default_factory=dict)
    dirty: dict[int, dict[int, int]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    changed: dict[int, set[int]] = field(default_factory=dict)
    unwritten: set[int] = field(default_factory=set)
    unlogged: set[tuple[int, int]] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    extents: list[tuple[int, Blob]] = field(default_factory=list)
    plain_unsynced: set[int] = field(default_factory=set)
    overwrote: bool = False
    freed: set[int] = field(default_factory=set)
    freed_metadata: set[int] = field(default_factory=set)
    waiting_metadata: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)
    free: set[int] = field(default_factory=set)
    logging: bool = False
    checkpointing: bool = False
    destaging: set[int] = field(default_factory=set)
    session: int = 0
    generation: int = 0
    half: int = 0
    at: int = 0
    seq: int = 1

    def has(self, rule: str) -> bool:
        assert rule in RULES
        return rule not in self.missing

    # Metadata: page 0 is L1, pages 1.. are refcounts, tables are where L1 says.

    def word(self, page: int, word: int) -> Any:
        return self.pages[page][word]

    def set_word(self, page: int, word: int, value: Any) -> None:
        self.pages[page][word] = value
        self.changed.setdefault(page, set()).add(word)
        self.unwritten.add(page)

    def count(self, place: int, count: int) -> None:
        self.set_word(1 + place // WORDS, place % WORDS, count)

    def entry(self, cluster: int) -> Any:
        table = self.word(0, cluster % TABLES)
        return None if table is None else self.word(table, cluster // TABLES)

    def map(self, cluster: int, entry: Any) -> None:
        table = self.word(0, cluster % TABLES)
        if table is None:
            table = self.take()
            self.new_table(cluster % TABLES, table, [None] * WORDS)
        old = self.word(table, cluster // TABLES)
        if old is not None and (entry is None or old[1] != entry[1]):
            self.count(old[1], 0)
            self.freed.add(old[1])
            if self.has("freed is not named"):
                # Or the place is used again while this is the last record, and recovery does not find the run.
                self.extents = [extent for extent in self.extents if extent[0] != old[1]]
        self.set_word(table, cluster // TABLES, entry)

    def new_table(self, index: int, place: int, words: list[Any]) -> None:
        self.pages[place] = list(words)
        self.changed[place] = set(range(WORDS))
        self.unwritten.add(place)
        self.count(place, 1)
        self.set_word(0, index, place)

    def take(self) -> int:
        free = self.free - self.busy
        if not free:
            raise OSError("full")
        place = min(free) if self.thrifty else self.random.choice(sorted(free))
        self.free.discard(place)
        return place

    # Commands.

    def content(self, cluster: int) -> tuple[int, ...]:
        entry = self.entry(cluster)
        base: Iterable[Any] = (0,) * BLOCKS
        if entry is not None and entry[0] == "blob":
            _, place, blob = entry
            if any(self.disk.read(("place", place, part)) != (blob, part) for part in (0, 1)):
                raise Lost(f"the run of cluster {cluster} at {place} is not there")
            base = blob.content
        elif entry is not None:
            base = [self.disk.read(("plain", entry[1], block)) for block in range(BLOCKS)]
            base = [value if isinstance(value, int) else -1 for value in base]
        return tuple(self.dirty.get(cluster, {}).get(block, value) for block, value in enumerate(base))

    def write(self, cluster: int, block: int, value: int) -> None:
        self.versions[cluster] = self.versions.get(cluster, 0) + 1
        entry = self.entry(cluster)
        if entry is not None and entry[0] == "plain" and cluster not in self.dirty and cluster not in self.destaging:
            self.disk.write(("plain", entry[1], block), value)
            self.overwrote = True
            return
        self.dirty.setdefault(cluster, {})[block] = value
        self.unlogged.add((cluster, block))

    def discard(self, cluster: int) -> None:
        self.versions[cluster] = self.versions.get(cluster, 0) + 1
        self.settle(cluster)
        if self.entry(cluster) is not None:
            self.map(cluster, None)

    def settle(self, cluster: int) -> None:
        self.settled.add(cluster)
        self.dirty.pop(cluster, None)
        self.unlogged -= {(cluster, block) for block in range(BLOCKS)}

    def destage(self, cluster: int) -> Step:
        """Compresses a dirty cluster, or writes it as it is, to a free place."""
        if cluster not in self.dirty or cluster in self.destaging or len(self.free) < 3:
            return
        self.destaging.add(cluster)
        version, content = self.versions.get(cluster), self.content(cluster)
        place = self.take()
        self.busy.add(place)
        plain = self.random.random() < 0.3
        blob = Blob(content)
        for part in (0, 1):
            if plain:
                self.disk.write(("plain", place, part), content[part])
            else:
                self.disk.write(("place", place, part), (blob, part))
            yield
        self.busy.discard(place)
        self.destaging.discard(cluster)
        if cluster not in self.dirty or (version != self.versions.get(cluster) and self.has("drop if rewritten")):
            # Never named by anything.
            self.free.add(place)
            return
        self.settle(cluster)
        if plain:
            self.plain_unsynced.add(place)
        else:
            self.extents.append((place, blob))
        self.count(place, 1)
        self.map(cluster, ("plain", place) if plain else ("blob", place, blob))

    def move_table(self, index: int) -> Step:
        """As for a snapshot: a table gets another place."""
        old = self.word(0, index)
        if old is None or len(self.free) < 3:
            return
        place = self.take()
        self.new_table(index, place, self.pages[old])
        del self.pages[old]
        self.changed.pop(old, None)
        self.unwritten.discard(old)
        self.count(old, 0)
        (self.freed_metadata if self.has("no early reuse of metadata") else self.freed).add(old)
        yield

    # The log.

    def flush(self) -> Step:
        while self.logging and self.has("one at a time"):
            yield
        self.logging = True
        yield from self.plain_first()
        record = self.record()
        if self.at + record.sectors > HALF or self.checkpointing_is_due():
            self.unrecord()
            self.logging = False
            yield from self.checkpoint()
            return
        if not (record.pages or record.pieces or record.settled or record.extents):
            if record.overwrote:
                yield from self.disk.sync()
            self.logging = False
            return
        yield from self.append(record)
        self.logging = False

    def checkpointing_is_due(self) -> bool:
        return not self.checkpointing and self.random.random() < 0.1

    def plain_first(self) -> Step:
        while self.plain_unsynced and self.has("plain first"):
            now = set(self.plain_unsynced)
            self.overwrote = False
            yield from self.disk.sync()
            self.plain_unsynced -= now
        self.plain_unsynced.clear()

    def record(self, *, images: bool = False) -> Record:
        """Takes what has changed since the last record."""
        changed = {page: set(words) for page, words in self.changed.items() if page in self.pages}
        if images and self.has("images"):
            changed |= {page: set(range(WORDS)) for page in self.unwritten}
        pieces = {key for key in self.unlogged if key[0] in self.dirty}
        if images and self.has("pieces again"):
            pieces |= {(cluster, block) for cluster, blocks in self.dirty.items() for block in blocks}
        found = Record(
            session=self.session,
            seq=self.seq,
            pages={page: {word: self.pages[page][word] for word in words} for page, words in changed.items()},
            settled=frozenset(self.settled) if self.has("settle") else frozenset(),
            extents=list(self.extents),
            pieces={(cluster, block): self.dirty[cluster][block] for cluster, block in pieces},
            images=images,
            overwrote=self.overwrote,
        )
        self.taken = (self.changed, self.settled, self.extents, self.unlogged, self.overwrote)
        self.changed, self.settled, self.extents, self.unlogged, self.overwrote = {}, set(), [], set(), False
        return found

    def unrecord(self) -> None:
        """Gives back what `record` has taken last."""
        self.changed, self.settled, self.extents, self.unlogged, self.overwrote = self.taken

    def append(self, record: Record) -> Step:
        """Writes a record behind the last one, and makes it durable with all that it names."""
        freed, self.freed = self.freed, set()
        if not self.has("no early reuse"):
            self.free |= freed
        self.waiting_metadata |= self.freed_metadata
        self.freed_metadata = set()
        sectors = [("log", self.half, self.at + number) for number in range(record.sectors)]
        for number, sector in enumerate(sectors):
            self.disk.write(sector, (record, number))
        self.at += record.sectors
        self.seq += 1
        whole_file = (record.extents and self.has("what it names")) or (record.overwrote and self.has("in place"))
        if self.has("sync images" if record.images else "sync"):
            yield from self.disk.sync() if whole_file else self.disk.sync_alone(sectors)
        self.free |= freed

    def checkpoint(self) -> Step:
        while self.checkpointing:
            yield
        self.checkpointing = True
        while self.logging:
            yield
        self.logging = True
        yield from self.plain_first()
        record = self.record(images=True)
        metadata, self.waiting_metadata = self.waiting_metadata | self.freed_metadata, set()
        self.freed_metadata = set()
        self.unwritten = set()
        self.half, self.at = 1 - self.half, 0
        assert record.sectors <= HALF, "the half is too small for a checkpoint"
        yield from self.append(record)
        self.logging = False
        yield from self.in_place(record)
        self.free |= metadata
        self.checkpointing = False

    def in_place(self, record: Record) -> Step:
        """Writes the pages of which a record has images, and a state that names it.

        One fdatasync is enough for both: recovery from there begins with these images.
        """
        for page, words in record.pages.items():
            if len(words) < WORDS and self.has("images"):
                continue
            now = [words.get(word, self.pages[page][word] if page in self.pages else 0) for word in range(WORDS)]
            for part in (0, 1):
                self.disk.write(("place", page, part), tuple(now[part * WORDS // 2 : (part + 1) * WORDS // 2]))
            if self.random.random() < 0.5:
                yield
        self.generation += 1
        self.disk.write(("state", self.generation % 2), (self.session, self.generation, self.half, record.seq))
        if self.has("sync state"):
            yield from self.disk.sync()

    # Life.

    def open(self) -> Step:
        """Recovers if there is a log, and begins one if there is none."""
        header = self.disk.read("header")
        if header is None:
            self.load({})
            self.session = self.random.getrandbits(60)
            for number in range(HALF):
                for half in (0, 1):
                    if self.has("session"):
                        self.disk.write(("log", half, number), None)
            for state in (0, 1):
                self.disk.write(("state", state), None)
            self.generation, self.half, self.at, self.seq = 1, 0, 0, 1
            self.disk.write(("state", 1), (self.session, 1, 0, 1))
            yield from self.disk.sync()
            self.disk.write("header", self.session)
            yield from self.disk.sync()
            return
        self.session = header
        yield from self.recover()

    def load(self, overlay: dict[int, dict[int, Any]]) -> None:
        """Puts pages together: what is in place, and the words of the log."""
        self.overlay = overlay
        for page in range(FIRST_PLACE):
            self.pages[page] = self.load_page(page, 0 if page else None)
        for table in [place for place in self.pages[0][:TABLES] if place is not None]:
            self.pages[table] = self.load_page(table, None)
        used = {place for place in range(PLACES) if self.word(1 + place // WORDS, place % WORDS)}
        self.free = set(range(FIRST_PLACE, PLACES)) - used

    def load_page(self, page: int, empty: Any) -> list[Any]:
        words: list[Any] = []
        for part in (0, 1):
            found = self.disk.read(("place", page, part))
            # What a table's place held before is no page; the words of its image cover it.
            is_page = isinstance(found, tuple) and len(found) == WORDS // 2 and not isinstance(found[0], Blob)
            words += found if is_page else [GARBAGE if found else empty] * (WORDS // 2)
        for word, value in self.overlay.get(page, {}).items():
            words[word] = value
        if GARBAGE in words:
            raise Lost(f"page {page} is torn and has no image")
        return words

    def read_record(self, half: int, at: int, seq: int) -> Record | None:
        found = self.disk.read(("log", half, at))
        if not (isinstance(found, tuple) and isinstance(found[0], Record) and found[1] == 0):
            return None
        record = found[0]
        if record.seq != seq or (record.session != self.session and self.has("session")):
            return None
        whole = all(self.disk.read(("log", half, at + n)) == (record, n) for n in range(record.sectors))
        return record if whole else None

    def recover(self) -> Step:
        states = [state for number in (0, 1) if isinstance(state := self.disk.read(("state", number)), tuple)]
        states = [state for state in states if state != GARBAGE and state[0] == self.session]
        if not states:
            raise Lost("no state is valid")
        _, self.generation, self.half, self.seq = max(states, key=lambda state: state[1])
        chain: list[tuple[int, int, Record]] = []
        half, at, seq = self.half, 0, self.seq
        while True:
            record = self.read_record(half, at, seq) if at < HALF else None
            if record is None and half == self.half:
                half, at = 1 - half, 0
                record = self.read_record(half, 0, seq)
            if record is None:
                break
            chain.append((half, at, record))
            at, seq = at + record.sectors, seq + 1
        if chain and self.has("verify"):
            half, at, last = chain[-1]
            good = all(self.disk.read(("place", place, part)) == (blob, part)
                       for place, blob in last.extents for part in (0, 1))  # fmt: skip
            if not good:
                chain.pop()
        end_half, end_at, self.seq = self.half, 0, self.seq
        if chain:
            end_half, end_at, last = chain[-1]
            end_at, self.seq = end_at + last.sectors, last.seq + 1
        overlay: dict[int, dict[int, Any]] = {}
        begun: Record | None = None
        for half, _, record in chain:
            if record.images and half != self.half:
                begun = record
            for page, words in record.pages.items():
                overlay.setdefault(page, {}).update(words)
            if not self.has("settled before pieces"):
                self.take_pieces(record)
            for cluster in record.settled:
                self.dirty.pop(cluster, None)
            if self.has("settled before pieces"):
                self.take_pieces(record)
        self.load(overlay)
        if self.has("zero the end"):
            for dead in {(end_half, end_at), (1 - self.half, 0) if end_half == self.half else (end_half, end_at)}:
                if dead[1] < HALF:
                    self.disk.write(("log", *dead), None)
            yield from self.disk.sync()
        if begun is not None and self.has("finish first"):
            self.half = end_half
            yield from self.in_place(begun)
        self.half, self.at = end_half, end_at
        self.unwritten = {page for page in overlay if page in self.pages}
        self.dirty = {cluster: blocks for cluster, blocks in self.dirty.items() if blocks}
        yield from self.checkpoint()

    def take_pieces(self, record: Record) -> None:
        for (cluster, block), value in record.pieces.items():
            self.dirty.setdefault(cluster, {})[block] = value

    def close(self) -> Step:
        for _ in range(10 * CLUSTERS):
            if not self.dirty:
                break
            cluster = next(iter(self.dirty))
            before = len(self.free)
            yield from self.destage(cluster)
            if cluster in self.dirty and before < 3:
                yield from self.checkpoint()
        if self.dirty:
            raise OSError("full")
        yield from self.checkpoint()
        self.disk.write("header", None)
        yield from self.disk.sync()

    def check(self) -> None:
        """What `qemu-img check` would say: refcounts and maps agree."""
        tables = [place for place in self.pages[0][:TABLES] if place is not None]
        entries = [entry for table in tables for entry in self.pages[table] if entry is not None]
        named = sorted([*tables, *(entry[1] for entry in entries)])
        counted = [place for place in range(PLACES) if self.word(1 + place // WORDS, place % WORDS)]
        if named != counted:
            raise Lost(f"places {named} are in use, places {counted} are counted")


class Trial:
    """Several lives on one disk."""

    def __init__(self, seed: int, missing: Iterable[str] = ()) -> None:
        self.random = Random(seed)
        self.disk = Disk()
        self.missing = frozenset(missing)
        self.value = 0
        self.thrifty = self.random.random() < 0.7
        self.risk = self.random.choice([0.003, 0.01, 0.03])
        self.opening_risk = self.random.choice([0.01, 0.1, 0.2])
        self.kinds = self.random.choices(["write", "destage", "flush", "checkpoint", "discard", "move"], k=8)
        self.kinds += ["write"] * 4 + ["destage"] * 3 + ["flush"] * 2
        self.durable = dict.fromkeys(((c, b) for c in range(CLUSTERS) for b in range(BLOCKS)), 0)
        self.newer: dict[tuple[int, int], list[int]] = {key: [] for key in self.durable}

    def run(self, lives: int = 6, steps: int = 150) -> None:
        """Raises `Lost` if something is."""
        for life in range(lives):
            engine = Engine(self.disk, self.random, self.missing, self.thrifty)
            try:
                self.drive(engine.open(), self.opening_risk if life else 0)
                self.look(engine)
                self.live(engine, steps)
                self.drive(engine.close(), self.risk)
                self.settle_all()
            except PowerCut:
                self.disk.cut(self.random)
        # At last without a power cut, closed, and opened once more.
        for _ in range(2):
            engine = Engine(self.disk, self.random, self.missing, self.thrifty)
            self.drive(engine.open(), 0)
            self.look(engine)
            self.drive(engine.close(), 0)

    def drive(self, steps: Step, risk: float) -> None:
        for _ in steps:
            if self.random.random() < risk:
                raise PowerCut

    def live(self, engine: Engine, steps: int) -> None:
        running: list[Step] = []
        for _ in range(steps):
            if self.random.random() < self.risk:
                raise PowerCut
            if running and self.random.random() < 0.6:
                step = self.random.choice(running)
                try:
                    next(step)
                except StopIteration:
                    running.remove(step)
                continue
            self.begin(engine, running)
        for step in running:
            self.drive(step, self.risk)

    def begin(self, engine: Engine, running: list[Step]) -> None:
        cluster, block = self.random.randrange(CLUSTERS), self.random.randrange(BLOCKS)
        match self.random.choice(self.kinds):
            case "write":
                self.value += 1
                self.newer[cluster, block].append(self.value)
                engine.write(cluster, block, self.value)
            case "discard":
                if cluster not in engine.destaging:
                    for number in range(BLOCKS):
                        self.newer[cluster, number].append(0)
                    engine.discard(cluster)
            case "destage":
                running.append(engine.destage(cluster))
            case "flush":
                running.append(self.flush(engine))
            case "checkpoint":
                running.append(engine.checkpoint())
            case "move":
                running.append(engine.move_table(self.random.randrange(TABLES)))

    def flush(self, engine: Engine) -> Step:
        before = {key: len(values) for key, values in self.newer.items()}
        last = {key: values[-1] for key, values in self.newer.items() if values}
        lists = dict(self.newer)
        yield from engine.flush()
        for key, count in before.items():
            if count and lists[key] is self.newer[key]:
                self.durable[key] = last[key]
                # A new list: what another flush, that began earlier, knows of the old one counts no more.
                self.newer[key] = self.newer[key][count:]

    def settle_all(self) -> None:
        for key, values in self.newer.items():
            if values:
                self.durable[key] = values[-1]
                self.newer[key] = []

    def look(self, engine: Engine) -> None:
        engine.check()
        for cluster in range(CLUSTERS):
            for block, found in enumerate(engine.content(cluster)):
                key = cluster, block
                if found not in (self.durable[key], *self.newer[key]):
                    raise Lost(
                        f"cluster {cluster} block {block} has {found}, not {self.durable[key]}, {self.newer[key]}"
                    )
                self.durable[key], self.newer[key] = found, []


def failures(trials: Iterable[int], missing: Iterable[str] = (), *, enough: int = 1 << 30) -> dict[int, str]:
    """Trials, by seed, that lose something, and what; no more of them than are enough."""
    found: dict[int, str] = {}
    for seed in trials:
        if len(found) >= enough:
            break
        try:
            Trial(seed, missing).run()
        # With a rule left out it may also stumble over what it reads.
        except Exception as error:
            if str(error) != "full":
                found[seed] = f"{type(error).__name__}: {error}"
    return found
