"""The noise schedule, and per-sample weights for models that do not predict v."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastunlearn.functional import velocity_loss
from fastunlearn.schedule import add_noise, velocity_error_weight, velocity_target
from fastunlearn.testing import oracle

# Both ends occur: CogVideoX's last alpha is exactly 0, and the first is set to 1 here.
ALPHAS = torch.linspace(1, 0, 11, dtype=torch.float64)
T = torch.tensor([0, 3, 7, 10])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "x0"])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_weights(prediction_type: str, loss_type: str) -> None:
    weight = velocity_error_weight(ALPHAS, T, prediction_type, loss_type)
    assert weight is not None
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, oracle.velocity_error_weight(ALPHAS, T, prediction_type, loss_type), rtol=1e-7)
    assert weight[-1 if prediction_type == "epsilon" else 0] == 0


def test_v_prediction_needs_no_weight() -> None:
    assert velocity_error_weight(ALPHAS, T, "v_prediction", "l2") is None


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_weighted_prediction_error_is_the_velocity_error(loss_type: str) -> None:
    t = T[1:3]
    x_0, noise, other = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = add_noise(x_0, noise, ALPHAS, t)
    alpha = ALPHAS[t].sqrt().reshape(2, 1, 1, 1)
    sigma = (1 - ALPHAS[t]).sqrt().reshape(2, 1, 1, 1)
    velocity = velocity_target(x_0, noise, ALPHAS, t)
    from_noise = velocity_target((x_t - sigma * other) / alpha, other, ALPHAS, t)
    from_sample = velocity_target(other, (x_t - alpha * other) / sigma, ALPHAS, t)
    for prediction_type, truth, other_velocity in (("epsilon", noise, from_noise), ("sample", x_0, from_sample)):
        weight = velocity_error_weight(ALPHAS, t, prediction_type, loss_type)
        loss = velocity_loss(other, truth, sample_weight=weight, loss_type=loss_type).loss
        torch.testing.assert_close(
            loss, velocity_loss(other_velocity, velocity, loss_type=loss_type).loss, rtol=1e-6, atol=0
        )


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="prediction_type: expected one of .*'sample'.* got 'v'"):
        velocity_error_weight(ALPHAS, T, "v", "l2")
    with pytest.raises(ValueError, match="loss_type: expected one of 'l2', 'l1', got 'huber'"):
        velocity_error_weight(ALPHAS, T, "epsilon", "huber")
    with pytest.raises(ValueError, match=r"t: expected shape \(B,\).*got \(\)"):
        velocity_error_weight(ALPHAS, T[0], "epsilon", "l2")
    with pytest.raises(TypeError, match="t: expected one of the dtypes.*float32"):
        velocity_error_weight(ALPHAS, T.float(), "epsilon", "l2")
    with pytest.raises(ValueError, match="t: expected timesteps from 0 to 10, got 11"):
        velocity_error_weight(ALPHAS, T + 1, "epsilon", "l2")
    with pytest.raises(ValueError, match="t: expected timesteps from 0 to 10, got -1"):
        add_noise(torch.ones(4), torch.ones(4), ALPHAS, T - 1)
    with pytest.raises(TypeError, match="alphas_cumprod: expected a tensor, got list"):
        velocity_target(torch.ones(4), torch.ones(4), [1.0], T)


def test_timesteps_of_any_integer_dtype() -> None:
    expected = velocity_error_weight(ALPHAS, T, "sample", "l2")
    assert torch.equal(velocity_error_weight(ALPHAS, T.to(torch.uint8), "sample", "l2"), expected)
