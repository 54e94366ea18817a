"""Tests of tcmu-rs."""
