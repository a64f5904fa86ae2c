"""The torch backend: every operation in bounded memory, for tensors that no Triton kernel runs on.

This is not the definition of the operations, which is `fastunlearn.ops.definition`. It computes the same in one pass
over blocks, see `blocks`, and with gradients written by hand, so that autograd keeps no intermediate tensors.

Arguments are those of `fastunlearn.functional`, already checked, and `is_compiled`: whether to compile the pass. Masks
are as in `fastunlearn.ops.spatial_masks`. Arithmetic is float32, or float64 if any input is float64. An element of
weight 0 contributes nothing, whatever its value.
"""

from fastunlearn.ops.torch_backend.concept_attention import concept_attention
from fastunlearn.ops.torch_backend.localization import localization_loss
from fastunlearn.ops.torch_backend.low_rank import low_rank_localization_loss
from fastunlearn.ops.torch_backend.velocity import (
    negatively_guided_velocity,
    negatively_guided_velocity_loss,
    velocity_loss,
)

__all__ = [
    "concept_attention",
    "localization_loss",
    "low_rank_localization_loss",
    "negatively_guided_velocity",
    "negatively_guided_velocity_loss",
    "velocity_loss",
]
