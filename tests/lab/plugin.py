"""The lab for pytest: a fixture that runs jobs, and tests that run in the guest.

**The fixture** boots one machine per job, five seconds and more each:

    def test_uname(lab: Lab) -> None:
        assert lab.run("uname -s").check().text == "Linux\n"

**Guest tests** are what lies in ``tests/guest/``, and whatever is marked ``guest``. They are collected
here and run there: all that were selected in one boot, by a pytest of the same virtual environment in the
guest, whose reports become the results here. So ``-k``, node ids, ``-x`` and the rest work as for any
test. A guest test may do with the kernel what it likes; if that kills the machine the test has failed,
with the kernel's last words in its report, and those behind it go on in a new machine. So it is if a test
takes longer than ``lab_test_timeout`` (an ini option in seconds) or than its mark says:
``@pytest.mark.guest(timeout=900)``.

A guest test fails too if the kernel logs a fault of its own meanwhile, such as a warning or a hung task,
unless it is marked ``@pytest.mark.guest(kernel_faults=True)``. With ``-s`` the output of the pytest in
the guest is shown as it comes.

All these tests carry the mark ``lab``. Where the lab lacks something they are skipped, and fail if
``CI=true``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .errors import LabError, MissingError
from .machine import DEFAULT_TIMEOUT, KERNEL_FAULT, SHARED, Machine, Result
from .provision import Provision, provide

_SELECTED = "selected"
_REPORTS = "reports"
_POLL_SECONDS = 0.05

_TIME_LIMIT = "360"

# A minute less, so that the stacks are in the report; it is for the host to end what hangs.
_STACKS = ("faulthandler_timeout=300", "faulthandler_exit_on_timeout=false")

# To boot, and to collect the tests: Python starts slowly under emulation.
_FIRST_NEWS_SECONDS = 300.0

# The batch of guest tests as a whole has no limit of its own: each of its tests has one.
_NO_TIMEOUT = 7 * 24 * 3600.0


class Lab:
    """What the fixture `lab` gives: machines, and what they boot with."""

    def __init__(self, provision: Provision) -> None:
        self.provision = provision

    def machine(
        self,
        job: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        env: Mapping[str, str] | None = None,
        disks: Sequence[Path] = (),
        memory: str = "2G",
        cpus: int = 2,
    ) -> Machine:
        """A machine for `job`; its arguments are those of `Machine`, and it is a context manager like it."""
        return Machine(job, timeout=timeout, env=env, disks=disks, memory=memory, cpus=cpus, provision=self.provision)

    def run(
        self,
        job: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        env: Mapping[str, str] | None = None,
        disks: Sequence[Path] = (),
        memory: str = "2G",
        cpus: int = 2,
    ) -> Result:
        """Boot a machine, run `job` in it, return what became of it; if the test fails, show that."""
        with self.machine(job, timeout=timeout, env=env, disks=disks, memory=memory, cpus=cpus) as machine:
            result = machine.wait()
        print(result.report())
        return result


@pytest.fixture(scope="session")
def lab() -> Lab:
    """Runs jobs under a real kernel."""
    if in_guest():
        pytest.fail("a test that runs in the guest cannot boot another one: use one of `guest` and `lab`")
    return Lab(require())


def in_guest() -> bool:
    """Whether this process runs in the guest."""
    return os.environ.get("TCMU_LAB_GUEST") == "1"


def require() -> Provision:
    """Return what a boot needs, or skip the test that asks, or fail it under CI."""
    try:
        return provide()
    except MissingError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the time limit of guest tests."""
    parser.addini("lab_test_timeout", "seconds that a test in the guest may take", default=_TIME_LIMIT)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks, and take on the part that belongs to this side of the guest's border."""
    config.addinivalue_line("markers", "lab: needs a real kernel, which boots in QEMU")
    config.addinivalue_line(
        "markers",
        "guest(timeout=None, kernel_faults=False): runs inside the guest, as all of tests/guest does; "
        "fails after `timeout` seconds, and if the kernel logs a fault of its own, unless that is expected",
    )
    if not in_guest():
        config.pluginmanager.register(_Host(config), "lab-host")
    elif (shared := Path(SHARED, _SELECTED)).exists():
        config.pluginmanager.register(_Guest(config, frozenset(json.loads(shared.read_text()))), "lab-guest")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need the lab, before pytest selects by marks."""
    guest_tests = config.rootpath / "tests" / "guest"
    for item in items:
        if item.path.is_relative_to(guest_tests) and item.get_closest_marker("guest") is None:
            item.add_marker("guest")
        if item.get_closest_marker("guest") is not None or "lab" in getattr(item, "fixturenames", ()):
            item.add_marker("lab")


class _Host:
    """Sends guest tests to the guest, all to one machine as long as it lives, and reports what they did."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._provision: Provision | None = None
        self._batch: _Batch | None = None
        self._hopeless: str | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.get_closest_marker("guest") is None:
            return None
        try:
            self._provision = self._provision or provide()
        except MissingError:
            return None  # pytest_runtest_setup says so
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, self._provision):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Catch the guest tests that the protocol above has left: they must not run on this machine."""
        if item.get_closest_marker("guest") is not None:
            require()
            pytest.fail("the lab is complete now and was not when this test's turn came; run it again")

    def pytest_unconfigure(self) -> None:
        self._close()

    def _reports(self, item: pytest.Item, provision: Provision) -> Iterator[pytest.TestReport]:
        if self._hopeless is not None:
            yield self._failure(item, self._hopeless)
            return
        try:
            if self._batch is None:
                self._batch = _Batch(self._config, self._remaining(item), provision)
            yield from self._batch.reports(item)
        except _NoReport as lost:
            # A machine that ran no test at all will not run one at the next attempt either.
            if not self._batch or not self._batch.any_started:
                self._hopeless = f"no test runs in the guest; see the report of {item.nodeid}"
            self._close()
            yield self._failure(item, str(lost))

    def _remaining(self, item: pytest.Item) -> list[pytest.Item]:
        items = item.session.items
        return [other for other in items[items.index(item) :] if other.get_closest_marker("guest") is not None]

    def _failure(self, item: pytest.Item, message: str) -> pytest.TestReport:
        return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), "failed", message, "call")

    def _close(self) -> None:
        if self._batch is not None:
            self._batch.close()
        self._batch = None


class _NoReport(Exception):
    """A test got no complete report from the guest; the message says why."""


class _Batch:
    """A pytest in the guest, and the reports that it has sent so far."""

    def __init__(self, config: pytest.Config, items: Sequence[pytest.Item], provision: Provision) -> None:
        self._config = config
        self._limits = {item.nodeid: _time_limit(item) for item in items}
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._finished: set[str] = set()
        self._running: str | None = None
        self._read_until = 0
        self._last_news = time.monotonic()
        self.any_started = False
        self._machine = Machine(
            _inner_pytest(config, items),
            timeout=_NO_TIMEOUT,
            on_output=_show if config.option.capture == "no" else None,
            directory=config.rootpath,
            provision=provision,
        )
        try:
            self._machine.__enter__()
        except LabError as error:
            raise _NoReport(str(error)) from error
        Path(self._machine.shared, _SELECTED).write_text(json.dumps([item.nodeid for item in items]))

    def close(self) -> None:
        """End the machine if it still runs."""
        self._machine.__exit__(None, None, None)

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the reports of `item` as they come.

        Raises:
            _NoReport: There are no more, although the test has not finished.
        """
        seen = 0
        while True:
            running = self._machine.running
            self._read()
            reports = self._reports.get(item.nodeid, [])
            yield from reports[seen:]
            seen = len(reports)
            if item.nodeid in self._finished:
                return
            if not running:
                raise _NoReport(self._obituary(item))
            limit = self._limits[self._running or item.nodeid] if self.any_started else _FIRST_NEWS_SECONDS
            if time.monotonic() - self._last_news > limit:
                self._machine.give_up()
                raise _NoReport(f"nothing happened for {limit:.0f} s; {self._obituary(item)}")
            time.sleep(_POLL_SECONDS)

    def _read(self) -> None:
        try:
            with Path(self._machine.shared, _REPORTS).open("rb") as file:
                file.seek(self._read_until)
                lines = file.readlines()
        except FileNotFoundError:
            return
        for line in lines:
            if not line.endswith(b"\n"):
                break  # being written
            self._read_until += len(line)
            self._take(json.loads(line))

    def _take(self, news: dict[str, Any]) -> None:
        self._last_news = time.monotonic()
        self.any_started = True
        nodeid = news["nodeid"]
        if "started" in news:
            self._running = nodeid
        elif "finished" in news:
            self._running = None
            self._finished.add(nodeid)
        else:
            data = news["report"]
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            if isinstance(report.longrepr, list):  # the place and reason of a skip, as JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            self._reports.setdefault(nodeid, []).append(report)

    def _obituary(self, item: pytest.Item) -> str:
        try:
            result = self._machine.wait()
        except LabError as error:
            return str(error)
        if self._running == item.nodeid:
            return f"the guest ended while the test ran\n{result.report()}"
        return f"the guest ended without running the test\n{result.report()}"


class _Guest:
    """Runs the tests that the host has selected, and writes down for it what becomes of each."""

    def __init__(self, config: pytest.Config, selected: frozenset[str]) -> None:
        self._config = config
        self._selected = selected
        self._file = Path(SHARED, _REPORTS).open("a")  # noqa: SIM115 - open until pytest ends
        self._kernel_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._kernel_log, 0, os.SEEK_END)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._selected]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Fail a test at whose time the kernel found a fault in itself."""
        yield
        faults = [line for line in self._new_kernel_lines() if KERNEL_FAULT.search(line)]
        mark = item.get_closest_marker("guest")
        if faults and not (mark and mark.kwargs.get("kernel_faults")):
            pytest.fail("the kernel reported faults of its own:\n" + "\n".join(faults), pytrace=False)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell(nodeid, started=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._tell(report.nodeid, report=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell(nodeid, finished=True)

    def pytest_unconfigure(self) -> None:
        self._file.close()
        os.close(self._kernel_log)

    def _new_kernel_lines(self) -> Iterator[str]:
        while True:
            # A broken pipe means that the kernel has overwritten what was next: reading goes on behind that.
            with contextlib.suppress(BrokenPipeError):
                try:
                    record = os.read(self._kernel_log, 8192)
                except BlockingIOError:
                    return
                yield record.decode(errors="replace").partition(";")[2].partition("\n")[0]

    def _tell(self, nodeid: str, **news: object) -> None:
        # What is no JSON can only be a value that a test has added by record_property: its repr will do.
        json.dump({"nodeid": nodeid, **news}, self._file, default=repr)
        self._file.write("\n")
        self._file.flush()


def _inner_pytest(config: pytest.Config, items: Sequence[pytest.Item]) -> str:
    """The job that runs the files of `items` with the plugins, settings and report style of this pytest."""
    files = dict.fromkeys(str(item.path.relative_to(config.rootpath)) for item in items)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--tb={config.option.tbstyle}"]
    command += ["--color=no", *["-v"] * config.option.verbose]
    for plugin in config.option.plugins:
        command += ["-p", plugin]
    for setting in [*_STACKS, *(config.option.override_ini or ())]:
        command += ["-o", setting]
    if config.option.capture == "no":
        command.append("--capture=no")
    if config.option.showlocals:
        command.append("--showlocals")
    if config.inipath is not None:
        command += ["-c", str(config.inipath)]
    return f"exec {shlex.join([*command, *files])}"


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.flush()


def _time_limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("guest")
    assert mark is not None
    limit = mark.kwargs.get("timeout")
    return float(item.config.getini("lab_test_timeout") if limit is None else limit)
