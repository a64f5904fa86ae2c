"""Triton kernels of fastunlearn, imported as `fastunlearn.kernels`."""
