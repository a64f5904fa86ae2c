"""Benchmarks of fastunlearn, imported as `fastunlearn.bench`."""
