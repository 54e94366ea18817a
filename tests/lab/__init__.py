"""A real Linux kernel with TCMU for tests and measurements, on any machine that has QEMU.

    >>> from tests.lab import run
    >>> run("uname -r; ls /sys/kernel/config/target/core").check().text

`run` boots a virtual machine, runs a bash script in it and returns what it wrote and how it ended.
`Machine` is the same for those who have something to do meanwhile, such as cutting its power.
``python -m tests.lab --help`` is the command line, and tests ask for the fixture `lab` (`tests.lab.plugin`).
"""

from .errors import BootError, LabError, MissingError
from .machine import CHECKOUT, SHARED, Machine, Result, Verdict, run
from .provision import GUEST_PACKAGES, Kernel, Provision, provide

__all__ = [
    "CHECKOUT",
    "GUEST_PACKAGES",
    "SHARED",
    "BootError",
    "Kernel",
    "LabError",
    "Machine",
    "MissingError",
    "Provision",
    "Result",
    "Verdict",
    "provide",
    "run",
]
