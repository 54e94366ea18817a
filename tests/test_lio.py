"""The part of the control plane that needs no kernel: what is refused, and what text the kernel gets."""

from __future__ import annotations

import multiprocessing
import os
import string
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import _lio
from tcmu_rs._lio import BackstoreExistsError, InvalidRequestError, LioError

file_names = st.one_of(st.text(st.characters(codec="utf-8")), st.binary().map(os.fsdecode))


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty target directory in the place of the kernel's."""
    (tmp_path / "target/core").mkdir(parents=True)
    monkeypatch.setattr(_lio, "TARGET", tmp_path / "target")
    monkeypatch.setattr(_lio, "_CORE", tmp_path / "target/core")
    monkeypatch.setattr(_lio, "RUN", tmp_path / "run")
    return tmp_path / "target"


@given(file_names)
def test_any_config_comes_back(config: str) -> None:
    assert _lio.decode_config(_lio.encode_config(config)) == os.fsdecode(os.fsencode(config))


@given(file_names)
def test_an_encoded_config_has_nothing_that_the_kernel_would_split_at(config: str) -> None:
    encoded = _lio.encode_config(config)
    assert not set(encoded) & set(":,\n\r\t \0")
    assert encoded.isprintable()


@pytest.mark.parametrize(
    ("config", "encoded"),
    [
        ("/var/tmp/disk.img", "/var/tmp/disk.img"),
        ("", ""),
        ("a:b,c%d e\n", "a%3Ab%2Cc%25d%20e%0A"),
        ("a;b=c", "a%3Bb=c"),
        ("/srv/größe.img", "/srv/größe.img"),
        (os.fsdecode(b"/\xff"), "/%FF"),
    ],
)
def test_encoding(config: str, encoded: str) -> None:
    assert _lio.encode_config(config) == encoded


@given(file_names, st.dictionaries(st.text("abc-", min_size=1), file_names))
def test_options_of_a_config(config: str, extra: dict[str, str]) -> None:
    text = ";".join([_lio.encode_config(config), *(f"{key}={_lio.encode_config(extra[key])}" for key in extra)])
    as_read = {key: os.fsdecode(os.fsencode(value)) for key, value in extra.items()}
    assert _lio.parse_config(text) == (os.fsdecode(os.fsencode(config)), as_read)


@pytest.mark.parametrize("text", ["a;", "a;b", "a;=c", "a;b=1;b=2"])
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no option, or is there twice"):
        _lio.parse_config(text)


def test_foreign_configs_are_shown_as_they_are() -> None:
    assert _lio.decode_config("rbd/pool/50%") == "rbd/pool/50%"


@pytest.mark.parametrize("name", ["a", "disk0", "A.b_c-d+e@f=g", "_x", "x" * 128, "0"])
def test_good_names(name: str) -> None:
    _lio.check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-x", "a/b", "a:b", "a b", "a,b", "a\n", "a\tb", "é", "x" * 129, "a\0"],
)
def test_names_that_the_kernel_or_other_tools_cannot_carry(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _lio.check_name(name)
    assert repr(name) in str(caught.value)
    assert "use " in str(caught.value)


def test_the_longest_config_and_the_one_beyond() -> None:
    assert len(_lio.device_config("file", "x" * 250)) == 255
    with pytest.raises(InvalidRequestError, match="256 bytes, the kernel keeps 255"):
        _lio.device_config("file", "x" * 251)
    # It is bytes that count, and those of the escapes.
    with pytest.raises(InvalidRequestError):
        _lio.device_config("file", ":" * 84)
    with pytest.raises(InvalidRequestError):
        _lio.device_config("file", "ö" * 126)


@pytest.mark.parametrize("handler", ["", "a/b", "a b", "a:b", "-"])
def test_bad_handler_names(handler: str) -> None:
    with pytest.raises(InvalidRequestError, match="handler name"):
        _lio.device_config(handler, "x")


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": -512},
        {"size": 1000},
        {"size": 512, "block_size": 4096},
        {"size": 1 << 63},
        {"block_size": 0},
        {"block_size": 520},
        {"data_pages_per_block": 0},
        {"data_area_mb": 0},
        {"ring_mb": -1},
        {"max_sectors": 1 << 31},
        {"wwn": "not a uuid"},
        {"wwn": ""},
    ],
)
def test_values_that_would_break_the_kernel_make_nothing(target: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError):
        _lio.create_backstore("disk", "ram", "", **{"size": 4096, **arguments})  # type: ignore[arg-type]
    assert list((target / "core").iterdir()) == []


def test_a_failure_half_way_leaves_nothing(target: Path) -> None:
    # A plain directory has no `control` file, so creation fails after both directories were made.
    with pytest.raises(LioError, match="control"):
        _lio.create_backstore("disk", "ram", "", 4096)
    assert list((target / "core").iterdir()) == []


def test_a_missing_target_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lio, "TARGET", tmp_path / "config/target")
    monkeypatch.setattr(_lio, "_CORE", tmp_path / "config/target/core")
    with pytest.raises(LioError, match=r"configfs is not mounted \(mount -t configfs"):
        _lio.create_backstore("disk", "ram", "", 4096)


def test_names_are_unique_and_numbers_shared_with_other_kinds(target: Path) -> None:
    for directory in ("user_0/a", "user_2/b", "iblock_1/c", "alua"):
        (target / "core" / directory).mkdir(parents=True)
    with ExitStack() as undo:
        assert _lio._take_name(iter(["a", "b", "c", "d"]), undo) == ("c", 3)
        with pytest.raises(BackstoreExistsError, match="device a exists already"):
            _lio._take_name(iter(["a"]), undo)
        with pytest.raises(InvalidRequestError):
            _lio._take_name(iter(["a", "x y"]), undo)
    assert not (target / "core/user_3").exists()
    assert [backstore.name for backstore in _lio.backstores()] == ["a", "b"]


def take_names(count: int) -> list[tuple[str, int]]:
    return [_lio._take_name((f"n{i}" for i in range(1000)), ExitStack()) for _ in range(count)]


def test_processes_do_not_take_the_same_name_or_number(target: Path) -> None:
    # Forked, so that the children have the made-up tree.
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = [entry for entries in pool.map(take_names, [25] * 4) for entry in entries]
    assert sorted(taken) == sorted((f"n{i}", i) for i in range(100))


def test_removal_is_idempotent(target: Path) -> None:
    backstore = _lio.Backstore("a", 5, "")
    _lio.remove_backstore(backstore)
    backstore.path.mkdir(parents=True)
    _lio.remove_backstore(backstore)
    _lio.withdraw(_lio.Exposure("loopback", "naa.5001405000000000"))
    assert list((target / "core").iterdir()) == []
    assert _lio.exposures(backstore) == []


def test_the_serial_number_is_stable_and_of_its_own() -> None:
    first = _lio.default_wwn("a", "file//x")
    assert first == _lio.default_wwn("a", "file//x")
    assert len({first, _lio.default_wwn("b", "file//x"), _lio.default_wwn("a", "file//y")}) == 3


def test_target_names_fit_their_fabrics() -> None:
    wwn = _lio.default_wwn("a", "file//x")
    loopback = _lio.target_wwn("loopback", wwn)
    assert loopback.startswith("naa.5001405")
    assert len(loopback) == 20
    assert set(loopback[4:]) <= set(string.hexdigits)
    assert _lio._IQN.fullmatch(_lio.target_wwn("iscsi", wwn))
    assert loopback != _lio.target_wwn("loopback", _lio.default_wwn("b", "file//x"))
    assert loopback == _lio.target_wwn("loopback", wwn.upper())


@pytest.mark.parametrize(
    ("portal", "parsed"),
    [
        ("127.0.0.1:3260", ("127.0.0.1", 3260, True)),
        ("[::1]:3260", ("[::1]", 3260, True)),
        ("0.0.0.0:1", ("0.0.0.0", 1, False)),
        ("10.0.0.1:3260", ("10.0.0.1", 3260, False)),
        ("[::]:3260", ("[::]", 3260, False)),
    ],
)
def test_portals(portal: str, parsed: tuple[str, int, bool]) -> None:
    assert _lio.parse_portal(portal) == parsed


@pytest.mark.parametrize(
    "portal", ["", "3260", "localhost:3260", "::1:3260", "[::1]", "[127.0.0.1]:1", "1.2.3.4:0", "1.2.3.4:x"]
)
def test_bad_portals(portal: str) -> None:
    with pytest.raises(InvalidRequestError, match="use an address and a port"):
        _lio.parse_portal(portal)


def test_an_open_portal_needs_a_word() -> None:
    with pytest.raises(InvalidRequestError, match="can be reached by other machines"):
        _lio.expose_iscsi(_lio.Backstore("a", 0, "x"), portal="0.0.0.0:3260")


@pytest.mark.parametrize(
    "iqn", ["disk", "iqn.2026-01", "iqn.2026-01.org", "iqn.2026-01.org.x:a_b", "iqn.2026-01.o.x:a b"]
)
def test_bad_target_names(iqn: str) -> None:
    with pytest.raises(InvalidRequestError, match="invalid target name"):
        _lio.expose_iscsi(_lio.Backstore("a", 0, "x"), iqn)
