"""The losses that erase a concept, as modules: they call the models, compute a loss, and fill the loss dict.

Signatures, defaults and dict keys are those of T2VUnlearning-style training loops for CogVideoX, HunyuanVideo and Wan.
Such a loop changes its imports, wraps its transformer in `as_velocity_model`, makes its erasers by `attach_erasers`,
and says `channel_dim=2` for CogVideoX. The numbers are not the same, because these things differ on purpose:

* Target: both its velocities come from the frozen model and carry no gradient, as in the paper (T2VUnlearning,
  arXiv:2505.17550). In such loops they come from the model that is being trained.
* Attention: maps are of the attention that the model computes, after query and key norms and rotary embeddings. Such
  loops hook `to_q` and `to_k`, before both.
* Text position: first among CogVideoX's tokens, last among HunyuanVideo's, apart in Wan's cross-attention, as the model
  has it. Such loops take the last `text_len` tokens, which in CogVideoX are of the video.
* Normalisation: of a map by the least and largest value of its sample, over all frames. In such loops: of its frame,
  which `get_mask(normalize_per="frame")` does too, so that every frame has a place of the concept.
* Average mask: the soft maps of all layers are averaged, normalised again, and thresholded to zeros and ones. In such
  loops it is the average of the first layer's binary mask and the other layers' soft maps, without a threshold; the
  first layer's mask is overwritten by it. `average_map` gives the soft average.
* Loss dict: every value is a detached tensor on the device, so that nothing here makes the host wait for a GPU.

**Thresholds do not transfer**: choose them anew, on masks that you have looked at (`fastunlearn.masks.overlay` shows
one on a video).

Receler's own loop, for the UNet of Stable Diffusion 1.4, is another matter. The losses take its tensors: wrap the UNet
in a function, pass `prediction_type="epsilon"`, and keep the loop's own captures, masks and erasers. Those of this
library are for the three families of video transformers and refuse a UNet; `get_mask` wants maps of one resolution,
with `height` and `width`. Localization takes a mask per layer, in a mapping, for layers of several resolutions.

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
