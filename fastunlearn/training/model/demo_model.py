"""The demo's little model in the place of a pipeline: by the name `demo`, or from a file of `demo.pretrain`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn.files import shown
from fastunlearn.training.model.pipeline_folder import ARGUMENT, INDEX

if TYPE_CHECKING:  # fastunlearn.demo imports fastunlearn.training
    from fastunlearn.demo.model import TextToVideo

NAME = "demo"


def load_demo_model(path: str | os.PathLike[str]) -> TextToVideo | None:
    """The demo's model, frozen, in float32 on the CPU; None if `path` means a pipeline.

    Args:
        path: "demo" for the model in the package, unless there is a folder of that name; or a .safetensors file that
            `python -m fastunlearn.demo.pretrain` wrote.

    Raises:
        FileNotFoundError: there is no such file, or the folder "demo" holds no pipeline.
        ValueError: it is damaged or holds something else.
    """
    name = os.path.expanduser(path)
    if name == NAME and os.path.isdir(name) and not os.path.exists(os.path.join(name, INDEX)):
        raise FileNotFoundError(
            f"{ARGUMENT}: expected a saved diffusers pipeline in the folder {NAME!r}, got no {INDEX} there; for the "
            "demo's model, run the command where there is no folder of that name, or rename it"
        )
    if os.path.isdir(name) or not (name == NAME or name.endswith(".safetensors")):
        return None
    if name != NAME and not os.path.lexists(name):
        raise FileNotFoundError(f"{ARGUMENT}: expected a file, got {shown(name, 300)}, which does not exist")
    from fastunlearn.demo.model import WEIGHTS, load

    model, _, _ = load(WEIGHTS if name == NAME else Path(name))
    return model


def warn_of_unknown_words(model: TextToVideo, prompts: Sequence[str]) -> None:
    """Warns if the demo's model does not know a word of `prompts`. It knows a dozen."""
    tokenizer = model.tokenizer
    for prompt in prompts:
        unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]
        if unknown:
            known = [token.lstrip("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and len(token) > 1]
            warnings.warn(
                f"prompts: expected words that the demo's model knows ({', '.join(sorted(known))}), got "
                f"{shown(unknown[0])} in {shown(prompt)}; it takes all other words for one and the same",
                stacklevel=4,
            )
            return
