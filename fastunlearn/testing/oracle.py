"""Every operation and its gradients in float64 NumPy, written from the mathematics and from nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_numpy(x: Any) -> np.ndarray:
    """A tensor or array as a float64 array."""
    return np.asarray(x.detach().cpu().double().numpy() if hasattr(x, "detach") else x, dtype=np.float64)


def nearest(mask: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """The mask (B, *any) resized to `spatial`: position i reads floor(i * in / out), in float32 as torch does."""
    for axis, size in enumerate(spatial, start=1):
        step = np.float32(mask.shape[axis]) / np.float32(max(size, 1))
        index = np.floor(np.arange(size, dtype=np.float32) * step).astype(np.int64)
        mask = np.take(mask, np.minimum(index, mask.shape[axis] - 1), axis=axis)
    return mask


def weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The product weights * values, with 0 * anything = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(weights == 0, 0.0, weights * values)


def velocity_loss(
    prediction: Any,
    uncond: Any,
    cond: Any = None,
    *,
    guidance_scale: float = 0.0,
    mask: Any = None,
    sample_weight: Any = None,
    channel_dim: int = 1,
    loss_type: str = "l2",
    reduction: str = "mean",
    mask_normalization: str = "all",
    weight: float = 1.0,
    upstream: Any = 1.0,
) -> dict[str, np.ndarray]:
    """The loss, the norms, and upstream * d loss / d input for prediction, uncond (or target) and cond.

    `mask` has no channel dim.
    """
    p, u = to_numpy(prediction), to_numpy(uncond)
    c = u if cond is None else to_numpy(cond)
    eta = 0.0 if cond is None else guidance_scale
    target = u if cond is None else u + eta * (u - c)
    m = np.ones(p.shape)
    if mask is not None:
        spatial = p.shape[1:channel_dim] + p.shape[channel_dim + 1 :]
        m = np.broadcast_to(np.expand_dims(nearest(to_numpy(mask), spatial), channel_dim), p.shape)
    w = m
    if sample_weight is not None:
        w = m * to_numpy(sample_weight).reshape(-1, *[1] * (p.ndim - 1))
    factor = weight
    if reduction == "mean":
        count = m.sum() if mask_normalization == "mask" else p.size
        factor = weight / count if count else 0.0
    error = p - target
    rho, slope = (error**2, 2 * error) if loss_type == "l2" else (np.abs(error), np.sign(error))
    losses = factor * weighted(w, rho)
    gradient = weighted(w, slope * factor * to_numpy(upstream))
    return {
        "loss": losses if reduction == "none" else losses.sum(),
        "prediction_norm": np.sqrt((p**2).sum()),
        "target_norm": np.sqrt((target**2).sum()),
        "prediction": gradient,
        "uncond": -(1 + eta) * gradient,
        "cond": eta * gradient,
    }


def localization_loss(
    outputs: list[Any],
    masks: list[Any],
    *,
    loss_type: str = "l2",
    normalization: str = "sum",
    weight: float = 1.0,
    upstream: float = 1.0,
) -> dict[str, Any]:
    """The loss, the layers' terms, and a list of gradients. A mask is (B or 1, N) or (B or 1, *spatial)."""
    terms, gradients = [], []
    for output, mask in zip(outputs, masks, strict=True):
        o, m = to_numpy(output), to_numpy(mask)
        if o.ndim == 3:
            outside, features = (1 - m)[:, :, None], o.shape[2]
        else:
            outside, features = (1 - nearest(m, o.shape[2:]))[:, None], o.shape[1]
        row_shape = list(o.shape)
        row_shape[2 if o.ndim == 3 else 1] = 1
        rows = np.broadcast_to(outside, row_shape)
        divisor = {"sum": o.shape[0], "mean": o.size, "background_mean": features * rows.sum()}[normalization]
        factor = 1 / divisor if divisor else 0.0
        x = weighted(rows, o)
        rho, slope = (x**2, 2 * x) if loss_type == "l2" else (np.abs(x), np.sign(x))
        terms.append(factor * rho.sum())
        gradients.append(weighted(rows, slope) * factor * weight / len(outputs) * upstream)
    return {
        "loss": weight * np.mean(terms) if terms else 0.0,
        "per_layer": np.array(terms),
        "gradients": gradients,
    }


def low_rank_localization_loss(
    outputs: list[tuple[Any, Any, Any]], masks: list[Any], *, loss_type: str = "l2", **options: Any
) -> dict[str, Any]:
    """The dense loss of hidden @ weight.T + bias, with gradients (hidden, weight, bias) per layer, by the chain rule.

    `magnitudes`, per layer: the size that the term and the three gradients would have if nothing cancelled.
    """
    factors = [tuple(np.zeros(1) if x is None else to_numpy(x) for x in output) for output in outputs]
    # A row of weight 0 adds nothing to the gradient of `weight`, whatever it holds.
    factors = [
        (np.where((1 - to_numpy(m) == 0)[:, :, None], 0.0, h), w, b)
        for (h, w, b), m in zip(factors, masks, strict=True)
    ]
    dense = [h @ w.T + b for h, w, b in factors]
    exact = localization_loss(dense, masks, loss_type=loss_type, **options)
    lengths = [
        (np.linalg.norm(h @ w.T, axis=2) + np.linalg.norm(b * np.ones(w.shape[0])))[:, :, None] for h, w, b in factors
    ]
    bounds = localization_loss(lengths, masks, loss_type=loss_type, **options)
    gradients, magnitudes = [], []
    for (h, w, _), slope, bound, term in zip(
        factors, exact["gradients"], bounds["gradients"], bounds["per_layer"], strict=True
    ):
        gradients.append((slope @ w, np.einsum("bnd,bnr->dr", slope, h), slope.sum((0, 1))))
        share = 1.0 if options.get("normalization", "sum") == "sum" else 1 / w.shape[0]
        steep = share * np.abs(bound)
        row = np.linalg.norm(w) * steep.max(initial=0)
        magnitudes.append((share * term, row, (steep * np.linalg.norm(h, axis=2, keepdims=True)).sum(), steep.sum()))
    return {**exact, "gradients": gradients, "magnitudes": magnitudes}


def concept_attention(
    query: Any, key: Any, token_indices: Any, *, scale: float | None = None, key_mask: Any = None
) -> np.ndarray:
    """The attention (B, Sq) to the tokens, from the whole Sq x Sk matrix."""
    q, k = to_numpy(query), to_numpy(key)
    batch, _, queries, d = q.shape
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) * (d**-0.5 if scale is None else scale)
    attended = np.ones((batch, k.shape[2]), bool) if key_mask is None else to_numpy(key_mask).astype(bool)
    unnormalised = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf)) * attended[:, None, None]
    total = unnormalised.sum(-1, keepdims=True)
    probability = np.divide(unnormalised, total, out=np.zeros_like(unnormalised), where=total > 0).mean(1)
    indices = np.broadcast_to(to_numpy(token_indices).astype(int), (batch, np.shape(token_indices)[-1]))
    result = np.zeros((batch, queries))
    for b in range(batch):
        for j in indices[b]:
            if j >= 0:
                result[b] += probability[b, :, j]
    return result


def velocity_error_weight(alphas_cumprod: Any, t: Any, prediction_type: str, loss_type: str) -> np.ndarray:
    """The velocity error divided by the prediction error, squared under "l2"."""
    a = to_numpy(alphas_cumprod)[to_numpy(t).astype(int)]
    root = np.sqrt(a) if prediction_type == "epsilon" else np.sqrt(1 - a)
    factor = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return factor**2 if loss_type == "l2" else factor
