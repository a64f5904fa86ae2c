"""From the erasers' gradients to their next weights, the same on every process.

The gradients of a step lie in one flat float32 tensor, of which the parameters' `grad`s are views, with the step's
losses behind them: so one all-reduce makes both those of all processes together, and what must be finite is read at
once. There is no DistributedDataParallel around the model. It wants one forward a backward, where a step has two, all
parameters in every step, where a step trains one of two transformers, and the module's own forward, where captures
listen inside. And it has nothing to offer: the erasers are small, and nothing else has gradients.

The learning rate is a function of the step's number alone, so that there is no scheduler's state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.training.options import TrainingOptions

LearningRateFactor = Callable[[int], float]

# Below this scale no gradient of a loss near 1 overflows float16: it is NaN, or the model is.
_LEAST_LOSS_SCALE = 2.0**-10


def learning_rate_factor(options: TrainingOptions) -> LearningRateFactor:
    """What the learning rate of a step, counted from 0, is multiplied by: diffusers' schedule of this name."""
    from diffusers.optimization import get_scheduler

    # The schedules ask an optimizer for its learning rate, and then are functions of the step.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.learning_rate or 1.0)
    scheduler = get_scheduler(
        options.lr_scheduler,
        stand_in,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    factor: LearningRateFactor = scheduler.lr_lambdas[0]
    return factor


class ErasersOptimizer:
    """Trains erasers: AdamW, or Muon for matrices and AdamW for biases, with clipping and float16's loss scaling.

    A step is `start`, any number of `backward`, `finish`.

    Args:
        experts: the parameters of every transformer's erasers. A step trains those of one.
        options: of training.
        factor: of the learning rate, by step.
        processes: how many processes there are to average gradients over.
        losses: how many losses a step has.
        dtype: what the model computes in; float16 has its losses scaled.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[nn.Parameter]],
        options: TrainingOptions,
        factor: LearningRateFactor,
        *,
        processes: int,
        losses: int,
        dtype: torch.dtype,
    ) -> None:
        self._experts, self._factor, self._processes = experts, factor, processes
        self._max_norm = options.max_grad_norm
        parameters = [parameter for expert in experts for parameter in expert]
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        biases = [parameter for parameter in parameters if parameter.ndim != 2]
        rate = options.learning_rate
        bias_rate = rate if options.bias_learning_rate is None else options.bias_learning_rate
        adam: dict[str, Any] = {
            "betas": (options.adam_beta1, options.adam_beta2),
            "eps": options.adam_epsilon,
            "weight_decay": options.adam_weight_decay,
        }
        of_biases = {"params": biases, "lr": bias_rate}
        self._optimizers: list[torch.optim.Optimizer]
        if options.optimizer == "muon":
            muon = torch.optim.Muon(
                matrices, lr=rate, weight_decay=options.adam_weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._optimizers = [muon, torch.optim.AdamW([of_biases], **adam)]
        else:
            self._optimizers = [torch.optim.AdamW([{"params": matrices, "lr": rate}, of_biases], **adam)]
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._losses = losses
        device = parameters[0].device
        self._flat = torch.empty(0, device=device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def drop_gradients(self) -> None:
        """Leaves no parameter with a gradient."""
        for parameters in self._experts:
            for parameter in parameters:
                parameter.grad = None

    def start(self, expert: int) -> None:
        """Begins a step of one transformer's erasers; the others' are left alone, by their optimizer too."""
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
        """Adds the gradients of the sum of `losses`, and each to its place; None where there is none."""
        present = [loss for loss in losses if loss is not None]
        torch.autograd.backward(self._scaler.scale(torch.stack(present).sum()))
        for place, loss in zip(self._flat[-self._losses :], losses, strict=True):
            if loss is not None:
                place.add_(loss.detach())

    def finish(self, step: int, check: Callable[[list[float], float | None], None]) -> dict[str, float]:
        """Averages over the processes, clips, and updates the erasers.

        Args:
            step: its number, from 0.
            check: is given the losses and the gradient's norm (None where float16 may overflow, which the loss scale
                then mends) before anything is updated, and raises if they are not finite.

        Returns:
            The step's `gradient_norm`, `learning_rate` and, in float16, `loss_scale`.

        Raises:
            FloatingPointError: no loss scale keeps float16 from overflowing.
        """
        if self._processes > 1:
            dist.all_reduce(self._flat)
            self._flat /= self._processes
        gradient, losses = self._flat[: -self._losses], self._flat[-self._losses :]
        scaled = self._scaler.is_enabled()
        if scaled:
            # Where one optimizer must not step, none may.
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
        facts = {"gradient_norm": norm_value, "learning_rate": self._rates[0][0] * factor}
        if scaled:
            facts["loss_scale"] = self._scaler.get_scale()
            if facts["loss_scale"] < _LEAST_LOSS_SCALE:
                raise FloatingPointError(
                    f"step {step + 1}: the gradient is not finite in float16 at any loss scale; use bf16"
                )
        return facts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            ValueError: the state is not of such optimizers.
        """
        try:
            for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
                _check_shapes(optimizer)
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"not the state of these optimizers ({type(error).__name__}: {error})") from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if what is kept of a parameter has another shape than the parameter."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
