"""Erase a concept from a text-to-video diffusion transformer: losses, masks, erasers and captures.

    losses          modules that call the models and return a loss and a dict of its parts
    functional      the same losses on tensors, and concept attention, with fused kernels
    erasers         small adapters on a frozen transformer's attentions (eraser_files: their files)
    capture         the erasers' outputs and attention maps of a forward pass (interception: where attention runs)
    masks           masks from attention maps
    schedule        noise schedules: adding noise, and weights for models that do not predict v
    velocity_model  a diffusers transformer as the callable (x_t, t, cond) -> velocity
    families        what the library knows of each family of models
    ops, kernels    the operations: their definition, their backends in torch and in Triton
    training        the commands prepare, train, evaluate and sample
    demo, bench     a concept erased from a tiny trained model in minutes; benchmarks
    testing         what proves the operations correct
    cli             the command line
    environment, files, devices, dtypes   what all of them share

Importing fastunlearn needs torch alone.
"""

from importlib.util import find_spec as _find_spec

if _find_spec("fastunlearn.kernels") is None:
    raise ImportError(
        "fastunlearn was imported from its source folder, which does not contain fastunlearn.kernels. Install it with "
        "`pip install -e .`, or run Python from another folder to use the installed package"
    )

from fastunlearn.capture import AttnMapsCapture, EraserOutputsCapture
from fastunlearn.erasers import (
    AdapterEraser,
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    load_erasers,
    save_erasers,
    set_eraser_scale,
)
from fastunlearn.functional import (
    LocalizationLoss,
    LowRankOutput,
    VelocityLoss,
    concept_attention,
    localization_loss,
    negatively_guided_velocity,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.losses import (
    ConceptPreservationLoss,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
)
from fastunlearn.masks import average_map, get_mask
from fastunlearn.velocity_model import VelocityModel, as_velocity_model

__version__ = "0.1.0"

__all__ = [
    "AdapterEraser",
    "AttnMapsCapture",
    "ConceptPreservationLoss",
    "EraserOutputsCapture",
    "LocalizationLoss",
    "LowRankOutput",
    "MaskLocalizationLoss",
    "NegativelyGuidedVelocityLoss",
    "T2VUnlearningLoss",
    "VelocityLoss",
    "VelocityModel",
    "as_velocity_model",
    "attach_erasers",
    "average_map",
    "concept_attention",
    "detach_erasers",
    "erasers_disabled",
    "get_mask",
    "load_erasers",
    "localization_loss",
    "negatively_guided_velocity",
    "negatively_guided_velocity_loss",
    "save_erasers",
    "set_eraser_scale",
    "velocity_loss",
]
