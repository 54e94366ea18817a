"""Handlers by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from tcmu_rs import _registry
from tcmu_rs._registry import GROUP, RegistryError


class Disk:
    class Inner:
        pass


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [
        EntryPoint("good", f"{__name__}:Disk", GROUP),
        EntryPoint("twice", f"{__name__}:Disk", GROUP),
        EntryPoint("twice", f"{__name__}:Disk.Inner", GROUP),
        EntryPoint("same", f"{__name__}:Disk", GROUP),
        EntryPoint("same", f"{__name__}:Disk", GROUP),
        EntryPoint("broken", "no.such.module:Disk", GROUP),
        EntryPoint("function", f"{__name__}:installed", GROUP),
    ]
    monkeypatch.setattr(_registry, "entry_points", lambda group: [offer for offer in offers if offer.group == group])


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("file:/a/b", ("file", "/a/b")),
        ("ram:", ("ram", "")),
        ("rbd:pool/image:snapshot", ("rbd", "pool/image:snapshot")),
    ],
)
def test_specs(spec: str, parsed: tuple[str, str]) -> None:
    assert _registry.parse_spec(spec) == parsed


@pytest.mark.parametrize("spec", ["", "file", ":config", "/var/tmp/disk.img"])
def test_bad_specs(spec: str) -> None:
    with pytest.raises(ValueError, match="HANDLER:CONFIG"):
        _registry.parse_spec(spec)


@pytest.mark.usefixtures("installed")
def test_a_handler_is_loaded() -> None:
    assert _registry.load("good") is Disk
    # The same offer seen twice, as an editable install shows it, is no conflict.
    assert _registry.load("same") is Disk


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "no handler 'missing'; installed: broken, function, good, same, twice"),
        ("twice", r"offered by .*:Disk\) and .*:Disk.Inner\)"),
        ("broken", "ModuleNotFoundError: No module named 'no'"),
        ("function", "is not a class"),
    ],
)
def test_a_handler_that_cannot_be_had(name: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        _registry.load(name)


def test_a_class_that_no_package_announces() -> None:
    assert _registry.load_class(f"{__name__}:Disk.Inner") is Disk.Inner


@pytest.mark.parametrize(
    "where", ["", "module", ":Disk", f"{__name__}:", f"{__name__}:Nothing", "no_such:Disk", f"{__name__}:GROUP"]
)
def test_a_class_that_cannot_be_had(where: str) -> None:
    with pytest.raises(RegistryError):
        _registry.load_class(where)


def test_the_shipped_handlers_are_there() -> None:
    assert {"file", "ram"} <= set(_registry.providers())
    assert _registry.load("ram").__name__ == "RamHandler"
