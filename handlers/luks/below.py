"""What a container is stored in: a file or any other handler, and perhaps another one for a detached header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from tcmu_rs import BlockHandler, Lower, Options, handler_below

from .container import write_pieces
from .volume import NewContainer


class Below:
    """What a container is stored in, as people write it.

    Attributes:
        own: Options that are for the container itself.
        layers: Class and configuration of what holds the data, and of what holds a detached header.
    """

    def __init__(self, config: str, options: Options) -> None:
        if not config:
            raise ValueError("luks needs a path: luks:/var/tmp/disk.luks")
        self.own, self._options = options.split()
        self.header = self.own.pop("header", None)
        texts = [config] if self.header is None else [config, self.header]
        self.layers = [handler_below(text) for text in texts]
        self._made: BlockHandler | None = None

    def open_data(self) -> BlockHandler:
        """The handler of what holds the data, not open yet."""
        if self._made is not None:
            return self._made
        kind, config = self.layers[0]
        return _block_handler(kind.from_config(config, self._options))

    def open_header(self, *, read_only: bool) -> BlockHandler | None:
        """The handler of what holds a detached header; it gets no options."""
        if self.header is None:
            return None
        kind, config = self.layers[1]
        plain = Options(read_only=read_only, interactive=self._options.interactive)
        return _block_handler(kind.from_config(config, plain))

    async def create(self, made: NewContainer, size: int) -> None:
        """Makes the storage and writes the header, or leaves nothing."""
        sizes = [made.volume.offset + size, made.header_size]
        done = 0
        try:
            for (kind, config), wanted in zip(self.layers, sizes, strict=False):
                handler = await kind.create(config, replace(self._below(done), size=wanted, create=True))
                done += 1
                if done == 1 and handler is not None:
                    self._made = _block_handler(handler)
            async with Lower(self.open_header(read_only=False) or self.open_data()) as lower:
                await write_pieces(lower, made.pieces)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.remove(done)
            raise

    async def remove(self, count: int = 2) -> bool:
        """Removes what `create` has made, and tells whether all of it is gone."""
        removed = [await kind.remove(config, self._below(n)) for n, (kind, config) in enumerate(self.layers[:count])]
        return all(removed)

    def _below(self, number: int) -> Options:
        return self._options if number == 0 else Options(interactive=self._options.interactive)


def _block_handler(handler: Any) -> BlockHandler:
    if not isinstance(handler, BlockHandler):
        raise ValueError(f"{type(handler).__name__} is no disk: nothing can be stored in it")
    return handler
