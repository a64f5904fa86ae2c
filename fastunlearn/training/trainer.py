"""The former name of `fastunlearn.training.train`, for code that imports it."""

from fastunlearn.training.loop.trainer import TrainingSummary
from fastunlearn.training.train import run, train

__all__ = ["TrainingSummary", "run", "train"]
