"""One training step with the drop-in losses, on a tiny random CogVideoX: `python -m fastunlearn.training.example_step`.

For loops that exist already, such as T2VUnlearning-style ones. Lines marked "New" are what such a loop adds.
`example.py` is the library's own way, from prompts to videos.
"""

from __future__ import annotations

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from fastunlearn import (
    AdapterEraser,
    AttnMapsCapture,
    EraserOutputsCapture,
    LowRankOutput,
    T2VUnlearningLoss,
    VelocityModel,
    as_velocity_model,
    attach_erasers,
    get_mask,
)


def training_step() -> tuple[VelocityModel, dict[str, AdapterEraser], dict[str, Tensor]]:
    """Takes one step. Returns the model, its erasers by layer, and the loss dict."""
    # What a loop has: a transformer, its noise schedule, noisy latents, timesteps, and text embeddings.
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
    )
    alphas_cumprod = torch.linspace(1, 0, 1000)  # scheduler.alphas_cumprod
    x_t, t = torch.randn(2, 3, 4, 8, 8), torch.tensor([400, 700])  # latents (B, F, C, H, W) and timesteps (B,)
    cond_target, cond_preserve, uncond = torch.randn(3, 2, 16, 32)  # "a nude person", "a person", and ""

    # New: the model as a callable (x_t, t, cond) -> velocity, and erasers on it. Only the erasers train.
    model = as_velocity_model(transformer)
    erasers = attach_erasers(model, rank=8)
    optimizer = torch.optim.AdamW([p for eraser in erasers.values() for p in eraser.parameters()], lr=1e-3)

    # New: CogVideoX's channels are dimension 2.
    loss_fn = T2VUnlearningLoss(alphas_cumprod=alphas_cumprod, guidance_scale=7.5, channel_dim=2)

    # New: patch_size, how many latent pixels a token covers along a side.
    attn_maps: dict[str, Tensor] = {}
    with torch.no_grad(), AttnMapsCapture(model, attn_maps):
        model(x_t, t, cond_target)
    masks = get_mask(attn_maps, [1, 2], 0.5, height=8, width=8, head_num=4, text_len=16, patch_size=2)

    # New: one model. The loss switches the erasers off to get the frozen model's velocities, and the capture
    # around it reads the erasers' outputs from the passes that the loss makes anyway.
    eraser_outputs: dict[str, Tensor | LowRankOutput] = {}
    with EraserOutputsCapture(model, erasers, eraser_outputs):
        loss, loss_dict = loss_fn(
            model_original=model,
            model_unlearned=model,
            x_t=x_t,
            t=t,
            cond_target=cond_target,
            uncond=uncond,
            cond_preserve=cond_preserve,
            mask=masks["average_mask"],
            eraser_outputs=eraser_outputs,
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return model, erasers, loss_dict


if __name__ == "__main__":
    print({name: round(value.item(), 4) for name, value in training_step()[2].items()})
