"""Handlers by name: entry points of installed packages, and classes given as `module:Class`.

A package offers a handler with an entry point in the group `tcmu_rs.handlers`: its name is the handler's part
of a specification `HANDLER:CONFIG`, its value the class. Nothing is imported before it is asked for, so a
broken package costs only its own handler.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "tcmu_rs.handlers"


class RegistryError(LookupError):
    """A handler cannot be had: nobody offers it, several do, or its import fails. The text says which."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Provider:
    """A package's offer of a handler.

    Attributes:
        name: Name of the handler.
        value: Where its class is, `module:Class`.
        package: Name and version of the distribution that offers it.
        entry_point: What `importlib.metadata` knows of it.
    """

    name: str
    value: str
    package: str
    entry_point: EntryPoint

    def load(self) -> type[Any]:
        """Imports the class.

        Raises:
            RegistryError: The import fails, or the value is not a class.
        """
        try:
            found = self.entry_point.load()
        # A stranger's module may raise anything while it is imported.
        except Exception as error:
            raise RegistryError(
                f"handler {self.name!r} of {self.package} cannot be loaded from {self.value}: "
                f"{type(error).__name__}: {error} (reinstall or repair that package)"
            ) from error
        if not isinstance(found, type):
            raise RegistryError(f"handler {self.name!r} of {self.package}: {self.value} is not a class")
        return found


def parse_spec(spec: str) -> tuple[str, str]:
    """Takes `HANDLER:CONFIG` apart; CONFIG may be empty and may contain colons.

    Raises:
        ValueError: There is no colon, or nothing before it.
    """
    handler, colon, config = spec.partition(":")
    if not colon or not handler:
        raise ValueError(f"{spec!r} is not of the form HANDLER:CONFIG (for instance file:/var/tmp/disk.img, ram:)")
    return handler, config


def providers() -> dict[str, list[Provider]]:
    """Lists what installed packages offer, by name. Imports none of it."""
    found: dict[str, list[Provider]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
        provider = Provider(entry.name, entry.value, package, entry)
        # The same distribution shows up twice when it is on the search path twice, as with an editable
        # install.
        if provider.value not in [other.value for other in found.setdefault(entry.name, [])]:
            found[entry.name].append(provider)
    return found


def conflict(offers: list[Provider]) -> str | None:
    """Tells who else offers the same name, or None if only one does."""
    if len(offers) < 2:
        return None
    names = " and ".join(f"{offer.package} ({offer.value})" for offer in offers)
    return f"handler {offers[0].name!r} is offered by {names} (uninstall one, or use --handler module:Class)"


def load(name: str) -> type[Any]:
    """Imports the handler of this name.

    Raises:
        RegistryError: Nobody offers it, several do, or its import fails.
    """
    known = providers()
    if name not in known:
        names = ", ".join(known) or "none"
        raise RegistryError(
            f"no handler {name!r}; installed: {names} (install the package that has it, or use --handler module:Class)"
        )
    if text := conflict(known[name]):
        raise RegistryError(text)
    return known[name][0].load()


def handler_below(config: str) -> tuple[type[Any], str]:
    """Finds what a layer sits on: the text behind the layer's own name and colon.

    What begins with the name of an installed handler and a colon is the specification of that handler, so
    `luks:qcow2:/var/tmp/disk` is a `luks` on a `qcow2`. All else is the path of a file, for the handler `file`; a path
    that begins so is written with `./` before it.

    Returns:
        The class, and its configuration: for its `from_config`, `create` and `remove`.

    Raises:
        ValueError: It can be read both ways, as there is such a file.
        RegistryError: The handler cannot be had.
    """
    name, colon, rest = config.partition(":")
    if not colon or name not in providers():
        return load("file"), config
    if os.path.lexists(config):
        raise ValueError(f"{config!r} is a file, and could be the handler {name!r}: write ./{config} for the file")
    return load(name), rest


def load_class(where: str) -> type[Any]:
    """Imports a class that no package announces.

    Args:
        where: `module:Class`, the class possibly within another: `module:Outer.Inner`.

    Raises:
        RegistryError: It is not of that form, or cannot be imported, or is not a class.
    """
    module, colon, path = where.partition(":")
    if not colon or not module or not path:
        raise RegistryError(f"{where!r} is not of the form module:Class")
    try:
        found: object = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        raise RegistryError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise RegistryError(f"{where} is not a class")
    return found
