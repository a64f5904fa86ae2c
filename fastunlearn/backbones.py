"""The former name of `fastunlearn.families` and `fastunlearn.velocity_model`, for code that imports it."""

from fastunlearn.families import FAMILIES as BACKBONES
from fastunlearn.families import Family as Backbone
from fastunlearn.families import attentions, find_transformer, patch_size
from fastunlearn.families import family_of as backbone_of
from fastunlearn.velocity_model import VelocityModel, as_velocity_model

__all__ = [
    "BACKBONES",
    "Backbone",
    "VelocityModel",
    "as_velocity_model",
    "attentions",
    "backbone_of",
    "find_transformer",
    "patch_size",
]
