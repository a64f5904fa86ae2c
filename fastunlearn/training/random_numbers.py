"""Random numbers that depend only on a key: not on the device, nor on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def random_generator(*key: object) -> torch.Generator:
    """A generator seeded with a key. It is on the CPU, so that the key gives the same numbers on every device.

    The key is hashed because the generator uses only 32 bits of its seed.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
