"""Text-to-video pipelines with random weights, small enough for a laptop. They are made without a network.

python -m fastunlearn.testing.tiny_pipelines cogvideox FOLDER
"""

from __future__ import annotations

import os

import torch

from fastunlearn import families
from fastunlearn.families.tiny import FRAMES, HEIGHT, WIDTH
from fastunlearn.files import expand_home
from fastunlearn.option_parser import OptionParser

__all__ = ["FRAMES", "HEIGHT", "VARIANTS", "WIDTH", "save_tiny_pipeline"]

VARIANTS = {
    name: make_pipeline for family in families.FAMILIES for name, make_pipeline in family.tiny_pipelines.items()
}
_FORMER_NAMES = {"hunyuanvideo": "hunyuan_video"}


def save_tiny_pipeline(family: str, folder: str | os.PathLike[str], seed: int = 0) -> None:
    """Saves a tiny random pipeline in the format of `save_pretrained`, for `from_pretrained` to load.

    The weights are scaled so that attention is far from uniform and the prompt changes the video. The same seed gives
    the same weights. torch's global random number generator is left as it was.

    Args:
        family: one of `VARIANTS`, such as "cogvideox" or "wan-2.2". `tiny_pipelines` in the family's file, in
            `fastunlearn.families`, says which model it imitates.
        folder: where to save it; created if it does not exist.
        seed: the seed of the weights.

    Raises:
        ValueError: the family is unknown.
    """
    family = _FORMER_NAMES.get(family, family)
    if family not in VARIANTS:
        raise ValueError(f"family: expected one of {', '.join(map(repr, VARIANTS))}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        VARIANTS[family]().save_pretrained(expand_home(folder))


def _main() -> None:
    parser = OptionParser(
        prog="python -m fastunlearn.testing.tiny_pipelines",
        description="Save a tiny text-to-video pipeline with random weights, made without a network.",
    )
    parser.add_argument(
        "family",
        choices=[*VARIANTS, *_FORMER_NAMES],
        metavar="family",
        help=f"which model to imitate: {', '.join(VARIANTS)}",
    )
    parser.add_argument("folder", help="the folder to save the pipeline in, created if it does not exist")
    options = parser.parse_args()
    save_tiny_pipeline(options.family, options.folder)


if __name__ == "__main__":
    _main()
