"""What proves the operations correct, for this project's tests and for its users: `fastunlearn verify` runs it.

Results are compared with a float64 oracle in NumPy. The error may be at most twice the error of eager torch computing
in float32 on the same inputs (`fastunlearn.ops.definition`), plus what rounding and the order of a sum may add. There
are no flat tolerances.
"""

from fastunlearn.testing import oracle
from fastunlearn.testing.cases import DTYPES, Case, cases, low_rank_outputs, random_mask, random_tensors
from fastunlearn.testing.checks import (
    check_concept_attention,
    check_gradients,
    check_localization_loss,
    check_low_rank_localization_loss,
    check_negatively_guided_velocity,
    check_velocity_loss,
    poisoned_memory,
)
from fastunlearn.testing.error_bound import Comparison, compare

__all__ = [
    "DTYPES",
    "Case",
    "Comparison",
    "cases",
    "check_concept_attention",
    "check_gradients",
    "check_localization_loss",
    "check_low_rank_localization_loss",
    "check_negatively_guided_velocity",
    "check_velocity_loss",
    "compare",
    "low_rank_outputs",
    "oracle",
    "poisoned_memory",
    "random_mask",
    "random_tensors",
]
