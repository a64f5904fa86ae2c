"""The losses that erase a concept, as modules: they call the models, compute a loss, and fill the loss dict.

Signatures, defaults and dict keys are those of T2VUnlearning-style training loops, so such a loop has to change one
import only. Two things differ on purpose. The target always comes from the frozen model and carries no gradient, as in
the paper (T2VUnlearning, arXiv:2505.17550). And every value in a loss dict is a detached tensor on the device, so that
nothing here makes the host wait for a GPU.

A model is any callable `(x_t, t, cond) -> velocity`; `fastunlearn.as_velocity_model` turns a diffusers transformer into
one. The loss functions on tensors, without models, are in `fastunlearn.functional`.

    unlearning.py       NegativelyGuidedVelocityLoss: away from the concept
    preservation.py     ConceptPreservationLoss: unchanged on what should stay
    localization.py     MaskLocalizationLoss: no change outside the concept's region
    total.py            T2VUnlearningLoss: the weighted sum of the three
    velocity_error.py   what the first two share
    velocity_models.py  calling the erased and the frozen model
"""

from torch import Tensor

from fastunlearn.losses.localization import MaskLocalizationLoss
from fastunlearn.losses.preservation import ConceptPreservationLoss
from fastunlearn.losses.total import T2VUnlearningLoss
from fastunlearn.losses.unlearning import NegativelyGuidedVelocityLoss
from fastunlearn.losses.velocity_models import VelocityModelLike

LossDict = dict[str, Tensor]

__all__ = [
    "ConceptPreservationLoss",
    "LossDict",
    "MaskLocalizationLoss",
    "NegativelyGuidedVelocityLoss",
    "T2VUnlearningLoss",
    "VelocityModelLike",
]
