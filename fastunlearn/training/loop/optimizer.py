"""The optimizer of the erasers, which makes the same update on every process.

All gradients of a step, followed by its losses, are one flat float32 tensor; the parameters' `grad`s are views of it.
So one all-reduce averages gradients and losses over the processes, and one read shows whether both are finite.

DistributedDataParallel is not used, because a step does not have the form that it expects. It expects one forward pass
per backward pass; a step has two. It expects gradients of all parameters; if there are two transformers, a step trains
the erasers of one. It wraps the model; captures need the model itself. Nor would it save time, because only the erasers
have gradients, and they are small.

The learning rate depends only on the step's number, so that checkpoints need no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.files import shown
from fastunlearn.training.loop.units import Units, learning_rates
from fastunlearn.training.model.video_model import Erasers
from fastunlearn.training.options import TrainingOptions

LearningRateFactor = Callable[[int], float]

# Below this scale, gradients of a loss near 1 no longer overflow float16. If they are still not finite, there is a NaN.
_LEAST_LOSS_SCALE = 2.0**-10

# What the optimizers keep for each parameter: tensors of its shape, and the number of steps, a scalar.
_MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def learning_rate_factor(options: TrainingOptions) -> LearningRateFactor:
    """Returns the schedule of diffusers that the options name, as a function: step, from 0 -> factor of the rate."""
    from diffusers.optimization import get_scheduler

    # diffusers reads the learning rate from an optimizer; the schedule itself is a function of the step.
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.learning_rate or 1.0)
    scheduler = get_scheduler(
        options.lr_scheduler,
        placeholder,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    factor: LearningRateFactor = scheduler.lr_lambdas[0]
    return factor


class ErasersOptimizer:
    """Trains erasers with AdamW, or with Muon for matrices and AdamW for biases; clips gradients and scales losses.

    A step is a call of `start`, any number of calls of `backward`, and a call of `finish`.

    Args:
        erasers: the erasers of each transformer, by layer. A step trains those of one transformer.
        options: the options of training.
        units: what the learning rates are relative to; None if they are as they are.
        factor: the factor of the learning rate, by step.
        processes: the number of processes to average gradients over.
        losses: the number of losses per step.
        dtype: the dtype that the model computes in. Losses are scaled if it is float16.
    """

    def __init__(
        self,
        erasers: Sequence[Erasers],
        options: TrainingOptions,
        units: Units | None,
        factor: LearningRateFactor,
        *,
        processes: int,
        losses: int,
        dtype: torch.dtype,
    ) -> None:
        self._experts = [[p for eraser in layers.values() for p in eraser.parameters()] for layers in erasers]
        self._factor, self._processes = factor, processes
        self._max_norm, self._learning_rate = options.max_grad_norm, options.learning_rate
        self._optimizers = _build_optimizers(erasers, options, units)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._losses = losses
        device = self._experts[0][0].device
        self._flat = torch.empty(0, device=device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def drop_gradients(self) -> None:
        """Removes the gradients of all parameters."""
        for parameters in self._experts:
            for parameter in parameters:
                parameter.grad = None

    def start(self, expert: int) -> None:
        """Begins a step that trains one transformer's erasers. The others are not touched, not even by weight decay."""
        self.drop_gradients()
        trained = self._experts[expert]
        sizes = [parameter.numel() for parameter in trained]
        length = sum(sizes) + self._losses
        if len(self._flat) != length:
            self._flat = self._flat.new_empty(length)
        self._flat.zero_()
        for parameter, view in zip(trained, self._flat.split([*sizes, self._losses]), strict=False):
            parameter.grad = view.view_as(parameter)

    def backward(self, losses: Sequence[Tensor | None]) -> None:
        """Adds the gradients of the sum of `losses`, and adds each loss to its total; a loss of None adds nothing."""
        present = [loss for loss in losses if loss is not None]
        torch.autograd.backward(self._scaler.scale(torch.stack(present).sum()))
        for total, loss in zip(self._flat[-self._losses :], losses, strict=True):
            if loss is not None:
                total.add_(loss.detach())

    def finish(self, step: int, check: Callable[[list[float], float | None], None]) -> dict[str, float]:
        """Averages over the processes, clips the gradient, and updates the erasers.

        Args:
            step: the number of the step, counted from 0.
            check: is called before the update with the losses and the gradient's norm, and raises if they are not
                finite. The norm is None in float16, where an overflow only lowers the loss scale.

        Returns:
            The step's `gradient_norm`, `learning_rate` and, in float16, `loss_scale`.

        Raises:
            FloatingPointError: float16 overflows at every loss scale.
        """
        if self._processes > 1:
            dist.all_reduce(self._flat)
            self._flat /= self._processes
        gradient, losses = self._flat[: -self._losses], self._flat[-self._losses :]
        scaled = self._scaler.is_enabled()
        if scaled:
            # If the gradients of one optimizer overflow, no optimizer may step.
            finite = torch.linalg.vector_norm(gradient).isfinite()
            gradient.add_(torch.where(finite, 0.0, math.inf))
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
        norm = torch.linalg.vector_norm(gradient)
        *values, norm_value = torch.cat([losses, norm[None]]).tolist()
        check(values, None if scaled else norm_value)
        if self._max_norm > 0:
            gradient.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        factor = self._factor(step)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self._scaler.step(optimizer)
        self._scaler.update()
        metrics = {"gradient_norm": norm_value, "learning_rate": self._learning_rate * factor}
        if scaled:
            metrics["loss_scale"] = self._scaler.get_scale()
            if metrics["loss_scale"] < _LEAST_LOSS_SCALE:
                raise FloatingPointError(
                    f"step {step + 1}: the gradient is not finite in float16 at any loss scale; use bf16"
                )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint holds."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Hyperparameters are those of the options, whatever the state says.

        Raises:
            ValueError: the state belongs to other optimizers, or has a value that no optimizer would have written.
        """
        stored = state.get("optimizers")
        if not isinstance(stored, list) or len(stored) != len(self._optimizers):
            raise ValueError(f"optimizers: expected the states of {len(self._optimizers)}, got another state")
        for optimizer, entry in zip(self._optimizers, stored, strict=True):
            own_groups = optimizer.state_dict()["param_groups"]
            moments = _checked_moments(optimizer, entry, [group["params"] for group in own_groups])
            optimizer.load_state_dict({"state": moments, "param_groups": own_groups})
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(self._scaler.state_dict() | _checked_scale(state.get("scaler")))


def _build_optimizers(
    erasers: Sequence[Erasers], options: TrainingOptions, units: Units | None
) -> list[torch.optim.Optimizer]:
    """One parameter group for each learning rate."""
    bias_rate = options.learning_rate if options.bias_learning_rate is None else options.bias_learning_rate
    matrices: dict[float, list[nn.Parameter]] = {}
    biases: dict[float, list[nn.Parameter]] = {}
    for expert, layers in enumerate(erasers):
        for layer, eraser in layers.items():
            relative = {} if units is None else learning_rates(eraser, units.layers[expert][layer], options.optimizer)
            for name, parameter in eraser.named_parameters():
                is_matrix = parameter.ndim == 2
                rate = (options.learning_rate if is_matrix else bias_rate) * relative.get(name, 1.0)
                (matrices if is_matrix else biases).setdefault(rate, []).append(parameter)
    adam: dict[str, Any] = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    matrix_groups, bias_groups = ([{"params": p, "lr": r} for r, p in by.items()] for by in (matrices, biases))
    if options.optimizer == "muon":
        muon = torch.optim.Muon(
            matrix_groups,
            lr=options.learning_rate,
            weight_decay=options.adam_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, torch.optim.AdamW(bias_groups, **adam)]
    return [torch.optim.AdamW([*matrix_groups, *bias_groups], **adam)]


def _checked_moments(optimizer: torch.optim.Optimizer, entry: Any, groups: list[list[int]]) -> dict[int, Any]:
    """The state of every parameter that has one, from an optimizer's stored state, by the parameter's number."""
    moments, stored_groups = (
        (entry.get("state"), entry.get("param_groups")) if isinstance(entry, dict) else (None, None)
    )
    if (
        not isinstance(moments, dict)
        or not isinstance(stored_groups, list)
        or [group.get("params") if isinstance(group, dict) else None for group in stored_groups] != groups
    ):
        raise ValueError("optimizers: expected the state of an optimizer of these erasers, got another state")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    names = _MOMENTS[type(optimizer)]
    for number, values in moments.items():
        parameter = parameters.get(number)
        if parameter is None:
            raise ValueError(f"state: expected a parameter's number, got {shown(number)}")
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"state: expected {', '.join(names)} of parameter {number}, got others")
        for name, value in values.items():
            shape = () if name == "step" else tuple(parameter.shape)
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
                got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else shown(value)
                raise ValueError(f"{name}: expected shape {shape} of torch.float32, got {got}")
            if not bool(value.isfinite().all()) or (name in ("step", "exp_avg_sq") and bool((value < 0).any())):
                raise ValueError(f"{name}: expected finite values that an optimizer can have, got others")
    return moments


def _checked_scale(scaler: Any) -> dict[str, float]:
    """The loss scale, and the number of steps since it last changed, from a stored state of the scaler."""
    state = scaler if isinstance(scaler, dict) else {}
    scale, steps = state.get("scale"), state.get("_growth_tracker")
    if not isinstance(scale, float) or not 0 < scale < math.inf or type(steps) is not int or not 0 <= steps < 2**31:
        raise ValueError("scaler: expected a loss scale and a number of steps, got another state")
    return {"scale": scale, "_growth_tracker": steps}
