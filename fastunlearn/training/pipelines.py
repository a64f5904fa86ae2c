"""The former name of modules in `fastunlearn.training.model`, for code that imports it."""

from fastunlearn.families import Condition
from fastunlearn.training.model.loading import Outline, load_model, outline_pipeline
from fastunlearn.training.model.text import EncodedPrompt, encode_prompts
from fastunlearn.training.model.video_model import VideoModel

__all__ = ["Condition", "EncodedPrompt", "Outline", "VideoModel", "encode_prompts", "load_model", "outline_pipeline"]
