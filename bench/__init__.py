"""Benchmarks, one module each: `python -m bench.micro`."""
