"""Random numbers that depend on a key alone: not on the device, nor on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def random_generator(*key: object) -> torch.Generator:
    """A generator on the CPU, so that a key gives the same numbers on every device.

    It reads only 32 bits of its seed: a hash, so that all of the key counts.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
