"""Tests that run inside the lab's guest, against a real kernel and as root (see `tests.lab.plugin`)."""
