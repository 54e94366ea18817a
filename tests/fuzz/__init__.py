"""Fuzz targets for what Python parses: `python -m tests.fuzz`, which says more."""
