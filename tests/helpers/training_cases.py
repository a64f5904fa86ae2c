"""A tiny model and its teacher cache in memory, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from torch import Tensor

from fastunlearn.families import LatentSpace
from fastunlearn.training.cache.reader import Points
from fastunlearn.training.model.video_model import Defaults, VideoModel
from fastunlearn.training.options import TrainingOptions


class MemoryPoints:
    """The part of `PointSet` that training uses; `uncond` is the condition of every point's `v_uncond`."""

    def __init__(self, points: Points, experts: Tensor, uncond: dict[str, Tensor]) -> None:
        self.points, self.experts, self.uncond = points, experts, uncond
        self.t, self.trajectories = points.t, torch.arange(len(experts))  # each has its own
        self.has_negative = torch.ones(len(experts), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.experts)

    def rows(self, indices: Tensor, negative: Tensor | None = None) -> Points:
        if negative is not None and negative.any():
            assert negative.all()
            points = self.points._replace(condition=self.uncond, v_cond=self.points.v_uncond)
            return MemoryPoints(points, self.experts, self.uncond).rows(indices)
        condition = {name: value[indices] for name, value in self.points.condition.items()}
        chosen = {
            name: None if value is None else value[indices]
            for name, value in self.points._asdict().items()
            if name != "condition"
        }
        return Points(condition=condition, **chosen)


class MemoryCache:
    """The part of `TeacherCache` that training uses."""

    def __init__(self, groups: dict[str, MemoryPoints], facts: dict[str, Any]) -> None:
        self.groups, self.facts, self.fingerprint = groups, facts, "0" * 64
        points = next(iter(groups.values())).points
        self.prompts = ["a circle", "a square"]
        self.condition_shapes = {name: tuple(value.shape[1:]) for name, value in points.condition.items()}

    def point_prompts(self) -> list[str]:
        return self.prompts


def tiny_model(family: str = "cogvideox", dtype: torch.dtype = torch.float32, experts: int = 1) -> VideoModel:
    """Makes a random model, the same one at every call."""
    (tiny_family,) = (tiny for tiny in tiny_models.FAMILIES if tiny.name == family)
    transformers = [tiny_family.make(seed=seed) for seed in range(experts)]
    if dtype != torch.float32:
        transformers = [transformer.to(dtype) for transformer in transformers]
    return VideoModel(
        transformers,
        None,
        latent_space=LatentSpace(frames=4, pixels=8),
        defaults=Defaults(6.0, 64, 64, 9, 8),
        boundary=None if experts == 1 else 500.0,
    )


def tiny_cache(model: VideoModel, points: int = 8, seed: int = 0) -> MemoryCache:
    """Runs `model` at random points, in groups of different sizes: "target" and "other", with masks, and "kept"."""
    generator = torch.Generator().manual_seed(seed)
    (family,) = (tiny for tiny in tiny_models.FAMILIES if tiny.name == model.family.name)
    groups, latent_shape = {}, ()
    for number, (name, size) in enumerate({"target": points, "other": points + 3, "kept": points + 1}.items()):
        x_t, _, cond = family.inputs(size, seed=seed + number + 1)
        _, _, uncond = family.inputs(size, seed=seed + number + 11)
        if isinstance(cond, Tensor):
            cond, uncond = {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}
        t = torch.randint(1, 1000, (size,), generator=generator).float()
        experts = torch.tensor([model.expert_index(value) for value in t.tolist()])
        velocities = []
        with torch.no_grad():
            for condition in (uncond, cond):
                outputs = [expert(x_t.to(model.dtype), t, condition) for expert in model.experts]
                velocities.append(torch.stack([outputs[e][i] for i, e in enumerate(experts.tolist())]))
        mask = None if name == "kept" else torch.rand(size, *tiny_models.GRID, generator=generator) < 0.3
        latent_shape = x_t.shape[1:]
        groups[name] = MemoryPoints(Points(x_t, t, cond, velocities[0], velocities[1], mask), experts, uncond)
    facts = {
        "backbone": model.family.name,
        "boundary": model.boundary,
        "latent_shape": list(latent_shape),
        "model": model.path,
        "concept": "circle",
    }
    return MemoryCache(groups, facts)


def options_for(output_dir: Path | str, **changes: Any) -> TrainingOptions:
    """Makes options for a few steps of small erasers: float32, no checkpoints, no held-out points, absolute units."""
    defaults: dict[str, Any] = {
        "rank": 4,
        "relative": False,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "checkpointing_steps": 1000,
        "validation_share": 0.0,
        "kept_negative_share": 0.0,
        "device": "cpu",
    }
    return TrainingOptions("", "", str(output_dir), **defaults | changes)  # type: ignore[arg-type]


def weights(model: VideoModel) -> dict[str, Tensor]:
    """Copies the parameters of the erasers."""
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, expert in enumerate(model.experts)
        for name, parameter in expert.named_parameters()
        if ".erasers." in name
    }
