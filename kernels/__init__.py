"""Triton kernels of fastunlearn, imported as `fastunlearn.kernels`. None yet: every op runs on the torch backend."""
