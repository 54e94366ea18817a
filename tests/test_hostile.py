"""What local users may write: specifications, configurations, names and options of all kinds and with all bytes.

Each is taken, or refused in one line that says what is wrong; nothing else comes out, and nothing is made.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcmu_rs import Handler, Options, _cli, _devices, _lio, _registry, _sysfs
from tcmu_rs._lio import LioError

from .hostile import open_and_close

# As the operating system has it: any bytes but NUL. And what Python can make of strings beside: NUL and surrogates.
texts = st.binary(max_size=40).map(os.fsdecode) | st.text(max_size=40)
words = st.sampled_from(
    ["file", "ram", "luks", "qcow2", "zstd", "faults", "/", ":", ";", "=", "%2", "%00", "..", "\n", "\x1b[2J"]
)
odd = st.lists(texts | words, max_size=6).map("".join)
handlers = st.sampled_from(sorted(_registry.providers()))
options = st.builds(
    Options,
    size=st.none() | st.integers(-(1 << 70), 1 << 70),
    block_size=st.none() | st.sampled_from([0, 511, 512, 4096]),
    read_only=st.booleans(),
    extra=st.dictionaries(odd | st.sampled_from(["direct", "key-file"]), odd, max_size=2),
)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(name=handlers, config=odd, asked=options)
def test_configurations_of_handlers(nowhere: Path, name: str, config: str, asked: Options) -> None:
    """Relative paths and others that are not there: opened they are errors that have a number, or a text."""
    kind = _registry.load(name)
    # No path of the machine is meant by chance.
    config = config.replace("/", "\N{FRACTION SLASH}")
    try:
        handler: Handler = kind.from_config(config, asked)
    except (OSError, ValueError, LioError, LookupError) as error:
        assert str(error)
        return

    if name != "ram":
        trio.run(open_and_close, handler)


@quick
@given(odd)
def test_specifications(text: str) -> None:
    try:
        handler, config = _registry.parse_spec(text)
    except ValueError as error:
        assert "HANDLER:CONFIG" in str(error)
    else:
        assert f"{handler}:{config}" == text
        with pytest.raises(_registry.RegistryError):
            _registry.load(f"no {handler}")


@quick
@given(handler=odd, config=odd)
def test_what_the_kernel_is_told_comes_back_or_is_refused(handler: str, config: str) -> None:
    try:
        text = _lio.device_config(handler, config)
    except (LioError, UnicodeEncodeError):
        return
    assert len(os.fsencode(text)) <= 255
    # One word of a `control` write.
    assert not set(text) & set(",\n\0")
    parsed = _sysfs.parse_uio_name(f"tcm-user/0/name/{text}")
    assert parsed is not None
    kind, _, rest = parsed[2].partition("/")
    assert (kind, _lio.decode_config(rest)) == (handler, config)


@quick
@given(odd)
def test_names_are_single_components_or_refused(name: str) -> None:
    try:
        _lio.check_name(name)
    except LioError as error:
        assert str(error)
    else:
        assert Path(name).name == name
        assert name.isascii()


@contextmanager
def terminal() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Standard output and error as a machine with UTF-8 has them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err
    out.flush()
    err.flush()


def run(*arguments: str) -> tuple[int, bytes, bytes]:
    with terminal() as (out, err):
        try:
            _cli.main(list(arguments))
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    assert isinstance(out.buffer, io.BytesIO)
    assert isinstance(err.buffer, io.BytesIO)
    return code, out.buffer.getvalue(), err.buffer.getvalue()


@quick
@given(
    command=st.sampled_from(["info", "check", "detach", "stats"]),
    argument=odd.filter(lambda text: not text.startswith("-")),
)
def test_commands_say_what_is_wrong_in_one_line(nowhere: Path, command: str, argument: str) -> None:
    code, out, err = run(command, argument.replace("/", "\N{FRACTION SLASH}").replace("\0", ""))
    assert code in (1, 2)
    assert out == b""
    assert err.startswith(b"error: ")
    assert err.count(b"\n") == 1
    assert b"Traceback" not in err


@quick
@given(name=odd, config=odd, as_json=st.booleans())
def test_the_list_shows_whatever_others_have_made(name: str, config: str, as_json: bool) -> None:
    device = _devices.Device(name, None, "foreign", config, 0, (), None, "unserved", f"/{name}")
    with mock.patch.object(_devices, "devices", lambda: [device]):
        code, out, err = run("list", *(["--json"] if as_json else []))
    assert (code, err) == (0, b"")
    assert out
    # No line of its own, and no sequence for the terminal.
    if not as_json:
        assert out.count(b"\n") == 2
    assert b"\x1b" not in out
