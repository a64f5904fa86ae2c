"""Text-to-video pipelines of every family, small enough for a laptop, with random weights, made without a network.

python -m fastunlearn.testing.tiny_pipelines cogvideox FOLDER
"""

from __future__ import annotations

import argparse
import os

import torch

from fastunlearn.families import FAMILIES
from fastunlearn.families.tiny import FRAMES, HEIGHT, WIDTH

__all__ = ["FRAMES", "HEIGHT", "VARIANTS", "WIDTH", "save_tiny_pipeline"]

VARIANTS = {name: make for family in FAMILIES for name, make in family.tiny_pipelines.items()}
_FORMER_NAMES = {"hunyuanvideo": "hunyuan_video"}


def save_tiny_pipeline(variant: str, folder: str | os.PathLike[str], seed: int = 0) -> None:
    """Saves a tiny random pipeline as `save_pretrained` does, for `from_pretrained` to load.

    Weights are scaled so that attention is far from uniform and prompts make a difference. The same seed gives the same
    weights; torch's own random number generator is left as it was.

    Args:
        variant: "cogvideox" (2B: no rotary embeddings), "cogvideox-rope" (5B), "hunyuan_video", "wan" (2.1) or
            "wan-2.2" (A14B: two transformers, divided at boundary_ratio 0.875).
        folder: where to save it; made if need be.
        seed: of the weights.

    Raises:
        ValueError: an unknown variant.
    """
    variant = _FORMER_NAMES.get(variant, variant)
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        VARIANTS[variant]().save_pretrained(folder)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.testing.tiny_pipelines", description=__doc__)
    parser.add_argument("variant", choices=[*VARIANTS, *_FORMER_NAMES], metavar="variant", help=", ".join(VARIANTS))
    parser.add_argument("folder", help="where to save the pipeline")
    options = parser.parse_args()
    save_tiny_pipeline(options.variant, options.folder)


if __name__ == "__main__":
    _main()
