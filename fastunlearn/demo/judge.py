"""The judge: a small classifier that recognizes the coloured objects in a video.

It separates colours by arithmetic and recognizes kinds of objects with a convolutional network. The network is trained
on rendered frames with some blur and noise, so that it can cope with the imperfect frames of a diffusion model. It
never sees a prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn.demo.world import HEIGHT, KINDS, WIDTH, background, palette, sample_videos

STEPS, BATCH, LEARNING_RATE = 500, 64, 3e-3
COLOUR_SPREAD = 0.15  # squared RGB distance over which one colour blends into another


def colour_maps(pixels: Tensor) -> Tensor:
    """Turns RGB (..., 3, H, W) in [-1, 1] into the share of each of the world's colours, (..., colours, H, W)."""
    known = torch.cat([palette(), background()[None]]).to(pixels)
    distance = (pixels[..., None, :, :, :] - known[:, :, None, None]).square().sum(dim=-3)
    # Clamped, because denormal numbers make a CPU six times slower.
    return (-distance / COLOUR_SPREAD).clamp(min=-20).softmax(dim=-3)[..., :-1, :, :]


class Judge(nn.Module):
    """Two convolutions and two linear layers over the map of each colour in each frame: 50 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 16, 3, padding=1)
        self.far = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (HEIGHT // 4) * (WIDTH // 4), 64)
        self.out = nn.Linear(64, len(KINDS))

    def forward(self, pixels: Tensor) -> Tensor:
        """Turns videos (B, F, 3, H, W) in [-1, 1] into logits (B, kinds, colours) of each kind in each colour."""
        maps = colour_maps(pixels)
        features = F.max_pool2d(F.gelu(self.near(maps.flatten(0, 2)[:, None])), 2)
        features = F.max_pool2d(F.gelu(self.far(features)), 2)
        logits = self.out(F.gelu(self.hidden(features.flatten(1))))
        return logits.unflatten(0, maps.shape[:3]).mean(dim=1).mT


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Adds blur and noise, with a random strength for every video."""
    blur = torch.rand(len(pixels), 1, 1, 1, 1, generator=generator) * 0.6
    soft = F.avg_pool2d(pixels.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).view_as(pixels)
    noise = torch.randn(pixels.shape, generator=generator) * torch.rand(blur.shape, generator=generator) * 0.15
    return torch.lerp(pixels, soft, blur) + noise


def train_judge(seed: int) -> Judge:
    """Trains a judge on single rendered frames. Takes 15 seconds on two cores."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=STEPS)
    for _ in tqdm(range(STEPS), desc="training the judge", unit="step"):
        videos = sample_videos(BATCH, generator)
        logits = judge(roughen(videos.pixels[:, :1], generator))
        loss = F.binary_cross_entropy_with_logits(logits, videos.present.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def held_out_accuracy(judge: Judge, seed: int, count: int = 1000) -> float:
    """Returns the share of newly rendered videos in which the judge sees every coloured object and no other."""
    videos = sample_videos(count, torch.Generator().manual_seed(seed))
    is_right = (judge(videos.pixels) > 0) == videos.present
    return is_right.flatten(1).all(dim=1).float().mean().item()
